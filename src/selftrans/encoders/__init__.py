"""Networks that turn pixels into something else: autoencoders (latents) and vision models (features)."""
