"""How metrics and groups are named, ordered and coloured, in TensorBoard's figures and in the report.

Colours are Okabe and Ito's, safe for colour-blind readers; a group has the same one everywhere.
"""

COLOURS = {
    "image": "#D55E00",
    "caption": "#0072B2",
    "text": "#009E73",
    "noise": "#CC79A7",
    "control": "#999999",
}
GROUPS = ("image", "caption", "text", "noise")
PANELS = {
    "fvu": "fvu: unexplained variance",
    "fvu_text": "fvu_text: error / variance of plain text",
    "mse": "mse",
    "cosine": "cosine(x, x')",
    "norm": "norm |x|",
    "l0": "l0: active latents per token",
    "shared": "shared: latents also alive in text",
    "loss_recovered": "loss recovered by the SAE's x'",
    "match": "match: descriptions agree with caption",
    "lens_hit": "lens_hit: caption word in logit lens",
    "knn": "knn: neighbours shared with text",
    "detectors": "detectors: attributes with a latent",
}
"""The metrics that are drawn, with their titles; all others are in the table."""
LOG_SCALE = {"mse", "norm", "l0", "fvu_text"}
PAPER_NAME = "Venhoff et al., Gemma 2 2B"
