"""What `import selftrans` offers: objective, guidances, backbones, samplers, and the records of methods and models."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from selftrans.flow import COSINE, LINEAR, PATHS, draw, interpolate
from selftrans.methods.fixed_draws import held_out_loss
from selftrans.methods.guidance import Frozen, Guidance
from selftrans.methods.objective import Objective
from selftrans.methods.self_transcendence import SelfGuidance, Stage1, Stage2, StructureGuidance
from selftrans.methods.spec import EncoderSpec, MethodSpec, Stage, TeacherSpec
from selftrans.models.hooked import HookedBackbone
from selftrans.models.sit import SIT_SIZES, SiT
from selftrans.models.spec import ModelConfig, ModelSpec
from selftrans.sampling.samplers import SAMPLERS, guided, ode, sde
from selftrans.sections import Section, setting
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
    "EncoderSpec",
    "Frozen",
    "Guidance",
    "HookedBackbone",
    "MethodSpec",
    "ModelConfig",
    "ModelSpec",
    "Objective",
    "Output",
    "Section",
    "SelfGuidance",
    "SiT",
    "Stage",
    "Stage1",
    "Stage2",
    "StructureGuidance",
    "TeacherSpec",
    "draw",
    "guided",
    "held_out_loss",
    "interpolate",
    "load",
    "ode",
    "sde",
    "setting",
]


def load(source: str | Path, *, stage: str | None = None, weights: Literal["ema", "raw"] = "ema") -> Backbone:
    """The trained model of a run, checkpoint, weights file or repository (`hf://owner/name[@revision]`): a torch module in eval
    mode, on the CPU.

    Args:
        stage: of the run; None: its last. Of a run of Self-Transcendence "stage1" is the teacher.
        weights: "ema", the moving average of the weights, or "raw", the weights themselves.
    ValueError where `source` holds no such model. Needs safetensors, and huggingface_hub for a repository.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights '{weights}' are unknown; choose 'ema' or 'raw'")
    from selftrans.checkpoints.load import load_model

    return load_model(source, stage=stage, weights=weights).model
