"""Small real parts for tests of sample quality: a judge in a folder, and a network for images in a file."""

import warnings
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

WORDS = "the cat sat on the mat and a dog ate the rat that lay in the malt of the house that jack built "
WINDOW = 16


def tokenizer(bos: str | None = "<s>") -> PreTrainedTokenizerFast:
    """Byte pairs learned from a few words: every text can be encoded."""
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    pairs.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    pairs.train_from_iterator([WORDS * 3], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=pairs, bos_token=bos)


def gpt2(vocab_size: int, seed: int = 0, window: int = WINDOW) -> GPT2LMHeadModel:
    """A GPT-2 with two layers of random weights, large enough to have opinions."""
    torch.manual_seed(seed)
    sizes = {"n_positions": window, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.4}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, bos_token_id=0, eos_token_id=0, **sizes)).eval()


def write_judge(folder: Path, seed: int = 0, bos: str | None = "<s>", window: int = WINDOW) -> Path:
    """A judge as `save_pretrained` leaves it; returns the folder."""
    words = tokenizer(bos)
    gpt2(len(words), seed, window).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


class Features(nn.Module):
    """Five features of an image: a convolution of random weights, averaged over the pixels."""

    def __init__(self, channels: int):
        super().__init__()
        torch.manual_seed(channels)
        self.convolution = nn.Conv2d(channels, 5, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.convolution(images.float() / 128 - 1)).mean((2, 3))


def write_features(file: Path, network: nn.Module, channels: int, size: int = 8) -> Path:
    """A network for images `[B, channels, size, size]` in a file of TorchScript; returns the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(network, torch.zeros(2, channels, size, size, dtype=torch.uint8)), file)
    return file
