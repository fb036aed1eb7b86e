"""How captions are stored, as the manifest says: the record, its parser, and the tensors that it adds to a shard.

    text      (count, K, L, E) float16 or bfloat16, tokens of each caption; or ids (count, K, L) int32, of the tokeniser
    mask      (count, K, L) uint8, 1 where there is no padding
    captions  (count,) int32, how many captions a row has: 1 .. K
    caption   (count, K, B) uint8, the captions themselves in UTF-8, padded with zeros
A row with fewer than K captions is filled up with zeros. `null.safetensors` holds one row, the empty caption: text (1, L, E)
and mask (1, L).
Shape legend: K captions of a row at most, L tokens of E channels, B bytes of a caption.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from selftrans.data.shard_file import Layout, row_bytes
from selftrans.messages import plural
from selftrans.plain_json import matching, one_of, within
from selftrans.types import MASK, TEXT, Conditions

#: what is kept of a caption: the encoder's output, or its input
Store: TypeAlias = Literal["tokens", "ids"]
IDS, COUNT, CAPTION = "ids", "captions", "caption"  #: names of tensors
STORES: tuple[Store, ...] = ("tokens", "ids")
TEXT_DTYPES = ("float16", "bfloat16")
NULL = "null.safetensors"
MAX_CAPTIONS, MAX_CAPTION_BYTES = 1 << 10, 1 << 12  #: largest K and B


@dataclass(frozen=True)
class Text:
    """How the captions of prepared data are stored."""

    stored: Store  #: with "ids" captions are encoded during training
    dtype: Annotated[str, one_of(TEXT_DTYPES)]  #: of stored tokens, and of the network that encodes ids on a GPU
    captions: Annotated[int, within(1, MAX_CAPTIONS)]  #: K
    bytes: Annotated[int, within(1, MAX_CAPTION_BYTES)]  #: B
    #: sha256 of null.safetensors; empty in a plan until that file is written
    null: Annotated[str, matching("([0-9a-f]{64})?", "a sha256 in hexadecimal, or empty")] = ""

    def layout(self, conditions: Conditions) -> Layout:
        """The tensors that captions add to a shard."""
        kept, tokens, width = self.captions, conditions.tokens, conditions.width
        ids, text = ("int32", (kept, tokens)), (self.dtype, (kept, tokens, width))
        return {
            **({IDS: ids} if self.stored == "ids" else {TEXT: text}),
            MASK: ("uint8", (kept, tokens)),
            COUNT: ("int32", ()),
            CAPTION: ("uint8", (kept, self.bytes)),
        }

    def null_layout(self, conditions: Conditions) -> Layout:
        """What null.safetensors holds."""
        return {TEXT: (self.dtype, (conditions.tokens, conditions.width)), MASK: ("uint8", (conditions.tokens,))}

    def caption_bytes(self, conditions: Conditions) -> int:
        """Bytes that one caption takes on disk."""
        return row_bytes(self.layout(conditions)) // self.captions

    def summary(self, conditions: Conditions) -> str:
        """A line to print."""
        what = f"tokens in {self.dtype}" if self.stored == "tokens" else "ids, to be encoded in training"
        return f"at most {plural(self.captions, 'caption')} each, {conditions}, stored as {what}"
