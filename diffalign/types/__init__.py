"""The contracts that every part shares: of batches, denoisers and methods, of rewards and encoders."""

from diffalign.types.methods import ALONE as ALONE
from diffalign.types.methods import Batch as Batch
from diffalign.types.methods import Cond as Cond
from diffalign.types.methods import Denoiser as Denoiser
from diffalign.types.methods import Encoder as Encoder
from diffalign.types.methods import ImageBatch as ImageBatch
from diffalign.types.methods import Method as Method
from diffalign.types.methods import Needs as Needs
from diffalign.types.methods import PairBatch as PairBatch
from diffalign.types.methods import ReferenceKind as ReferenceKind
from diffalign.types.methods import Replay as Replay
from diffalign.types.methods import RunningMean as RunningMean
from diffalign.types.methods import Shared as Shared
from diffalign.types.methods import StepLoss as StepLoss
from diffalign.types.methods import alone as alone
from diffalign.types.rewards import Credit as Credit
from diffalign.types.rewards import DifferentiableReward as DifferentiableReward
from diffalign.types.rewards import Embedded as Embedded
from diffalign.types.rewards import FunctionReward as FunctionReward
from diffalign.types.rewards import MediaEncoder as MediaEncoder
from diffalign.types.rewards import Modality as Modality
from diffalign.types.rewards import Reward as Reward
from diffalign.types.rewards import RewardBatch as RewardBatch
from diffalign.types.rewards import RewardOutput as RewardOutput
from diffalign.types.rewards import SetOutput as SetOutput
from diffalign.types.rewards import SetReward as SetReward
