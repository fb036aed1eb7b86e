"""Operations of a model, counted by hand."""


def sit_forward_flops(tokens, width, depth, inside, *, final=True):
    """Operations (2 per multiply-add) of one image through SiT, by hand; `inside`: channels x patch² of a token."""
    embed = tokens * inside * width + (256 + width) * width
    block = 6 * width**2 + tokens * width * (3 + 1 + 8) * width + 2 * tokens**2 * width
    last = 2 * width**2 + tokens * width * inside
    return 2 * (embed + depth * block + last * final)
