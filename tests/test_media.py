"""Pictures and clips as files and as rewards take them."""

import io
import struct
import wave

import numpy as np
import pytest
import torch

from diffalign.data.sounds import read_wav, rounded, wav
from diffalign.denoisers import Context
from diffalign.errors import InputError
from diffalign.evaluate.media import PICTURES, Clips, Medium, medium_of
from diffalign.rewards.audio import resample
from tests.audio_builders import noise, tone

RATE = 16_000
SOUND = Context(sample_rate_hz=RATE, seconds=1.0)


def clips(*counts: int) -> list[torch.Tensor]:
    return [tone(220.0 * (i + 1), count, RATE) for i, count in enumerate(counts)]


# --- WAV files


def test_a_clip_comes_back_as_it_was_stored_and_no_further_than_half_a_step(tmp_path):
    clip = torch.cat([noise(0, 4000, 1.0), tone(440, 4000, RATE)])
    clip[0, :4] = torch.tensor([1.0, -1.0, 0.0, 2.0])
    (tmp_path / "a.wav").write_bytes(wav(clip, RATE))
    back, rate_hz = read_wav(tmp_path / "a.wav")
    assert rate_hz == RATE
    assert torch.equal(back, rounded(clip))
    assert (back - clip.clamp(-1, 1)).abs().max() <= 1 / 2**15
    assert back[0, :4].tolist() == [1 - 2**-15, -1.0, 0.0, 1 - 2**-15]
    assert torch.equal(rounded(back), back)


def test_other_readers_read_what_was_written():
    clip = torch.cat([tone(440, 800, RATE), -tone(440, 800, RATE)])
    with wave.open(io.BytesIO(wav(clip, RATE))) as theirs:
        assert (theirs.getnchannels(), theirs.getframerate(), theirs.getsampwidth()) == (2, RATE, 2)
        frames = np.frombuffer(theirs.readframes(theirs.getnframes()), dtype="<i2").reshape(-1, 2)
    assert (frames[:, 0] == -frames[:, 1]).all()
    assert abs(frames[9, 0] / 2**15 - clip[0, 9]) <= 2**-16


def pcm(bits: int, frames: bytes) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(bits // 8)
        file.setframerate(RATE)
        file.writeframes(frames)
    return out.getvalue()


@pytest.mark.parametrize(
    ("bits", "frames"),
    [
        (8, bytes([128, 192, 0])),
        (16, struct.pack("<3h", 0, 2**14, -(2**15))),
        (24, b"".join(int(v).to_bytes(3, "little", signed=True) for v in (0, 2**22, -(2**23)))),
        (32, struct.pack("<3i", 0, 2**30, -(2**31))),
    ],
)
def test_full_scale_is_1_at_every_width(tmp_path, bits, frames):
    (tmp_path / "a.wav").write_bytes(pcm(bits, frames))
    assert read_wav(tmp_path / "a.wav")[0].tolist() == [[0.0, 0.5, -1.0]]


def test_float_files_are_read_as_they_are(tmp_path):
    from scipy.io import wavfile

    samples = np.array([[0.25, -0.5], [0.125, 1.0]], dtype=np.float32)
    wavfile.write(tmp_path / "a.wav", 44_100, samples)
    clip, rate_hz = read_wav(tmp_path / "a.wav")
    assert (clip.tolist(), rate_hz) == (samples.T.tolist(), 44_100)


def test_a_file_that_is_no_wav_is_named(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"ID3 and no more")
    with pytest.raises(InputError, match=r"a\.wav' must be a readable WAV file"):
        read_wav(tmp_path / "a.wav")
    with pytest.raises(InputError, match=r"gone\.wav' must be a readable WAV file"):
        read_wav(tmp_path / "gone.wav")


# --- media


def test_each_medium_fills_what_its_rewards_ask_for():
    found = {modality: medium_of(modality, SOUND) for modality in ("image", "audio")}
    assert all(isinstance(medium, Medium) for medium in found.values())
    assert found["image"] is PICTURES
    shown = found["image"].asked(torch.rand(2, 3, 4, 4), ["a", "b"], [{}, {}])
    assert shown.images is not None
    assert shown.audio is None
    heard = found["audio"].asked(torch.stack(clips(800, 800)), ["a", "b"], [{}, {}])
    assert heard.images is None
    assert (len(heard), heard.sample_rate) == (2, RATE)
    assert torch.equal(heard.audio[1], clips(800, 800)[1])


@pytest.mark.parametrize("sample", [torch.rand(3, 5, 7), 2 * torch.rand(2, 40) - 1], ids=["picture", "clip"])
def test_what_is_stored_is_what_is_read_back(tmp_path, sample):
    medium = PICTURES if sample.dim() == 3 else Clips(rate_hz=RATE)
    file = tmp_path / f"a{medium.suffix}"
    file.write_bytes(medium.encoded(sample))
    assert torch.equal(medium.read(file), medium.stored(sample[None])[0])


def test_clips_are_heard_at_another_rate_and_mixed_down_only_where_asked():
    two = torch.stack([torch.cat([tone(300, 1600, RATE), tone(900, 1600, RATE)])])
    plain = Clips(rate_hz=RATE).asked(two, ["a"], [{}])
    assert torch.equal(plain.audio[0], two[0])
    asked = Clips(rate_hz=RATE, heard_hz=48_000, mono=True).asked(two, ["a"], [{}])
    assert asked.sample_rate == 48_000
    assert torch.equal(asked.audio[0], resample(two[0].mean(0, keepdim=True), RATE, 48_000))


def test_exemplars_may_differ_in_length_and_in_rate_where_a_rate_is_named(tmp_path):
    for i, clip in enumerate(clips(1600, 2400, 3200)):
        (tmp_path / f"{i}.wav").write_bytes(wav(clip, RATE))
    [read] = Clips(rate_hz=RATE).exemplars(tmp_path)
    assert [clip.shape[1] for clip in read.audio] == [1600, 2400, 3200]
    (tmp_path / "9.wav").write_bytes(wav(tone(440, 8000, 8_000), 8_000))
    with pytest.raises(InputError, match=r"9\.wav' must have 16000 samples a second like the model's clips, got 8000"):
        list(Clips(rate_hz=RATE).exemplars(tmp_path))
    [read] = Clips(rate_hz=RATE, heard_hz=RATE).exemplars(tmp_path)
    assert [clip.shape[1] for clip in read.audio] == [1600, 2400, 3200, 16_000]


def test_a_clip_of_another_rate_is_not_the_models(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav(tone(440, 800, 8_000), 8_000))
    with pytest.raises(InputError, match="must have 16000 samples a second, as the model makes them, got 8000"):
        Clips(rate_hz=RATE).read(tmp_path / "a.wav")


def test_a_folder_without_clips_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("no sound")
    with pytest.raises(InputError, match=r"clips must be a folder with \.wav files, got none"):
        list(Clips(rate_hz=RATE).exemplars(tmp_path))


@pytest.mark.parametrize(("way", "named"), [({"heard_hz": 8000}, "heard_hz 8000"), ({"mono": True}, "mono")])
def test_images_are_not_heard(way, named):
    with pytest.raises(InputError, match=f"must be left out with a model of images, got {named}"):
        medium_of("image", Context(), **way)
