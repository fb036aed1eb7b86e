"""Our backbones as a model of diffusers: `ModelMixin` and `ConfigMixin`, one safetensors file and one config.json.

The file is a weights file that every command takes in place of a run. Nothing in a folder is executed: the model is one of the
registry, by name. Shape legend: N batch, (C, *S) latent, L text tokens of E channels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.load import PREFIX, TRANSFORMER, LoadedModel, architecture, find, load_model
from selftrans.messages import first_line
from selftrans.plugins import NotFound
from selftrans.sampling.samplers import extrapolated
from selftrans.storage import write_json
from selftrans.types import MASK, TEXT, Cond

WEIGHTS = Path(TRANSFORMER).name  #: diffusers' name


class InterpolantTransformer(ModelMixin, ConfigMixin):
    """A backbone of selftrans that predicts the velocity at a point on the path between data and noise.

    `backbone` is the model itself, with features by block (`taps`).

    Args:
        header: what a weights file of selftrans says of its model (`checkpoints.load.header`): settings, shape of a latent,
            conditions, classes. The model gets random weights. ValueError where it does not describe a model.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(self, header: dict[str, Any]) -> None:
        super().__init__()
        try:
            self.settings, shape, self.conditions = architecture(header)
            self.backbone = self.settings.build_model(shape, self.conditions)
        except NotFound as error:
            raise ValueError(error.in_file) from error
        except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise ValueError(
                f"the header does not describe a model ({first_line(error)}); was it written by another version?"
            ) from error

    @classmethod
    def of(cls, loaded: LoadedModel, header: dict[str, Any]) -> Self:
        """The model that `loaded` holds, not copied, with the header of its file."""
        with torch.device("meta"):
            made = cls(header | {"weights": loaded.weights})
        made.backbone, made.conditions = loaded.model, loaded.model.conditions
        return made

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        **ignored: Any,
    ) -> Self:
        """Read a folder of `save_pretrained`, a run, a weights file, or a model on the hub (`hf://owner/name`).

        Other options of diffusers have no effect. ValueError where there is no such model.
        """
        source = Path(pretrained_model_name_or_path, subfolder) if subfolder else pretrained_model_name_or_path
        file = Path(source) / WEIGHTS
        file = file if file.is_file() else find(source)
        found = cls.of(load_model(file), checkpoint.read_header(file))
        return found if torch_dtype is None else found.to(torch_dtype)

    def save_pretrained(
        self, save_directory: str | Path, is_main_process: bool = True, safe_serialization: bool = True, **ignored: Any
    ) -> None:
        """Write config.json and one safetensors file. ValueError for another format, and where they cannot be written."""
        if not safe_serialization:
            raise ValueError("weights are saved as safetensors only; leave out safe_serialization=False")
        if not is_main_process:
            return
        folder, settings = Path(save_directory), dict(self.config)
        header = json.loads(json.dumps(settings["header"])) | {PREFIX: "backbone."}
        checkpoint.write_tensors(folder / WEIGHTS, self.state_dict(), {checkpoint.KEY: json.dumps(header)})
        kept = {name: value for name, value in settings.items() if not name.startswith("_") or name == "_class_name"}
        write_json(folder / self.config_name, {"_class_name": type(self).__name__} | kept | {"header": header})

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
        early_guidance: float = 1.0,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Velocity (N, C, *S), noise minus data on the linear path, at hidden_states (N, C, *S).

        Args:
            timestep: t, (N,) in [0, 1]; 0 is data.
            class_labels: (N,), of a model of classes; the number of classes is the null label.
            encoder_hidden_states: (N, L, E) with encoder_attention_mask (N, L) bool, of a model of text.
            early_guidance: of a model with a second output, see `samplers.extrapolated`; 1: none.
        In reduced precision products are computed in the dtype of the weights, all else in float32.
        """
        cond = self.condition(len(hidden_states), class_labels, encoder_hidden_states, encoder_attention_mask)
        reduced = self.dtype != torch.float32
        with torch.autocast(hidden_states.device.type, dtype=self.dtype, enabled=reduced):
            v = (
                self.backbone(hidden_states, timestep, cond).v
                if early_guidance == 1
                else extrapolated(self.backbone, hidden_states, timestep, cond, early_guidance)
            )
        assert v is not None
        v = v.to(hidden_states.dtype)
        return Transformer2DModelOutput(sample=v) if return_dict else (v,)

    def condition(
        self, n: int, labels: Tensor | None = None, text: Tensor | None = None, mask: Tensor | None = None
    ) -> Cond:
        """The condition of n samples; of a model without classes labels may be None. ValueError for one of another kind."""
        if self.conditions.kind == "text":
            if text is None or mask is None:
                raise ValueError("a model of text needs encoder_hidden_states and encoder_attention_mask")
            return {TEXT: text, MASK: mask}
        if labels is None and self.conditions.kind == "labels":
            raise ValueError(f"a model of {self.conditions} needs class_labels")
        return torch.zeros(n, dtype=torch.long, device=self.device) if labels is None else labels
