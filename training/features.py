"""Whisper's log-mel features on the device that trains."""

import torch
from torch import Tensor, nn
from transformers import WhisperFeatureExtractor


class LogMel(nn.Module):
    """Waveforms [B, samples] at 16 kHz -> log-mel features [B, mel bins, frames] of `WhisperFeatureExtractor`.

    The extractor pads to 30 s; here silence is padded up to the frames asked for. Each utterance is scaled by the
    maximum over its window, and silence never is the maximum, so a shorter window changes no frame within it but the
    last, whose 25 ms reach over the edge.
    """

    filters: Tensor
    window: Tensor

    def __init__(self, extractor: WhisperFeatureExtractor) -> None:
        super().__init__()
        self.n_fft, self.hop = extractor.n_fft, extractor.hop_length
        filters = torch.as_tensor(extractor.mel_filters, dtype=torch.float32)  # [n_fft / 2 + 1, mel bins]
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("window", torch.hann_window(self.n_fft), persistent=False)

    @torch.no_grad()
    def forward(self, waveforms: Tensor, mel_frames: int) -> Tensor:
        """waveforms [B, samples] float32, padded with zeros -> [B, mel bins, mel_frames] float32.

        Raises:
            ValueError: the waveforms are longer than the frames.
        """
        samples = mel_frames * self.hop
        if waveforms.shape[1] > samples:
            raise ValueError(f"waveforms has {waveforms.shape[1]} samples, {mel_frames} frames hold {samples}")
        with torch.autocast(waveforms.device.type, enabled=False):
            padded = nn.functional.pad(waveforms.float(), (0, samples - waveforms.shape[1]))
            spectrum = torch.stft(padded, self.n_fft, self.hop, window=self.window, return_complex=True)
            power = spectrum[..., :-1].abs().square()  # [B, n_fft / 2 + 1, frames]
            log_mel = (self.filters.mT @ power).clamp(min=1e-10).log10()
            floor = log_mel.amax(dim=(1, 2), keepdim=True) - 8.0
            return (torch.maximum(log_mel, floor) + 4.0) / 4.0
