"""Families of models: one file each, one line each in `FAMILIES`."""

from diffalign.denoisers.class_dit import DIT
from diffalign.denoisers.dit import SD3
from diffalign.denoisers.family import Context, Family
from diffalign.denoisers.flux import FLUX
from diffalign.denoisers.pixart import PIXART_ALPHA, PIXART_SIGMA
from diffalign.denoisers.sdxl import SDXL, SDXL_REFINER
from diffalign.denoisers.stable_audio_3 import STABLE_AUDIO_3
from diffalign.denoisers.unet import SD

__all__ = ["FAMILIES", "Context", "Family"]

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (SD, SDXL, SDXL_REFINER, PIXART_ALPHA, PIXART_SIGMA, SD3, FLUX, DIT, STABLE_AUDIO_3)
}
