"""The families whose decomposition is proven, one declarative file each."""

from qklens.models.families.llama import LLAMA

FAMILIES = {family.model_type: family for family in (LLAMA,)}
