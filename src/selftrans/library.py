"""What `import selftrans` offers to a training loop of one's own: objective, guidances, backbones and samplers."""

from selftrans.flow import COSINE, LINEAR, PATHS, draw, interpolate
from selftrans.methods.guidance import Frozen, Guidance
from selftrans.methods.objective import Objective
from selftrans.methods.self_transcendence import SelfGuidance, Stage1, Stage2, StructureGuidance
from selftrans.models.sit import SIT_SIZES, SiT
from selftrans.sampling.samplers import SAMPLERS, guided, ode, sde
from selftrans.types import Backbone, Batch, Cond, Conditions, Draw, Output

__all__ = [
    "COSINE",
    "LINEAR",
    "PATHS",
    "SAMPLERS",
    "SIT_SIZES",
    "Backbone",
    "Batch",
    "Cond",
    "Conditions",
    "Draw",
    "Frozen",
    "Guidance",
    "Objective",
    "Output",
    "SelfGuidance",
    "SiT",
    "Stage1",
    "Stage2",
    "StructureGuidance",
    "draw",
    "guided",
    "interpolate",
    "ode",
    "sde",
]
