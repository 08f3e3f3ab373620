"""The paper's figures, to stand beside ours: Liu, Qin, Peng, Lee, arXiv 2309.11756, Whisper-medium, 1 K utterances."""

SETS = ("C1", "C2", "Aishell-1", "zh-HK", "en")
# Error rates in percent at r = 8: character errors, for `en` word errors; and trainable parameters in percent.
METHODS: dict[str, tuple[float | None, tuple[float, ...]]] = {
    "zero-shot": (None, (11.29, 19.25, 9.79, 31.14, 7.93)),
    "full": (100.0, (19.86, 31.97, 28.90, 57.70, 11.47)),
    "glora": (0.81, (8.85, 13.04, 6.71, 31.79, 6.69)),
    "adalora": (0.46, (8.46, 13.73, 7.65, 34.79, 7.57)),
    "lora": (0.31, (9.32, 14.73, 7.52, 33.30, 7.35)),
    "bitfit": (0.08, (8.72, 13.38, 7.85, 34.77, 7.50)),
    "ia3": (0.03, (10.24, 15.73, 9.55, 34.26, 6.62)),
    "alpha-lora": (0.31, (8.77, 13.68, 6.37, 33.01, 6.73)),
    "s2lora": (0.02, (8.67, 13.19, 6.81, 33.71, 6.72)),
}
RANKS = (1, 8, 32)
# Character error rates on C1 and on C2 for r = 1, 8, 32.
RANK_SWEEP: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "lora": ((10.63, 9.32, 9.22), (17.87, 14.73, 14.45)),
    "adalora": ((8.93, 8.46, 8.79), (14.26, 13.73, 13.48)),
    "adalora-without-orthogonality": ((8.81, 8.62, 8.78), (14.46, 12.56, 13.35)),
    "adalora-without-allocation": ((8.53, 8.53, 8.78), (13.80, 13.80, 13.38)),
    "adalora-without-both": ((8.64, 8.64, 8.76), (12.52, 12.52, 13.41)),
    "alpha-lora": ((8.86, 8.77, 8.47), (13.75, 13.68, 12.70)),
}
