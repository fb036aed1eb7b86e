"""From a model to images: samplers, the one path from a checkpoint to images, folders of samples."""
