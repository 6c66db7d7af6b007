"""Families of models: one file each, one line each in `FAMILIES`."""

from diffalign.denoisers.dit import SD3
from diffalign.denoisers.family import Family
from diffalign.denoisers.unet import SD

FAMILIES: dict[str, Family] = {family.name: family for family in (SD, SD3)}
