"""Frozen encoders of pixels: autoencoders (latents) and vision models (features)."""
