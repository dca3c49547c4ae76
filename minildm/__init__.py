"""minildm: latent diffusion models, built step by step in notebooks and exported from them."""

__version__ = "0.1.0"


def __getattr__(name: str):
    # LatentDiffusion is looked up on first use, so that `import minildm` does not wait for torch.
    if name == "LatentDiffusion":
        from minildm.pipeline import LatentDiffusion

        return LatentDiffusion
    raise AttributeError(f"module 'minildm' has no attribute {name!r}")
