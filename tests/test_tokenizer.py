"""Tokenizers: codebook against its formulas, files and hashes, DALL-E's encoder, teachers, training, evaluation."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import timm
import torch
from conftest import (
    TINY_ENCODER,
    TINY_TOKENIZER,
    TINY_VQKD,
    run_python,
    teacher_folder,
    tiny_recipe,
    tokenizer_file,
)
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.build import build_objective
from ssl_vit.config import InputError, check, to_yaml
from ssl_vit.encoders.base import create_encoder
from ssl_vit.modules.codebook import Codebook
from ssl_vit.modules.dalle import DalleTokenizer, load_dalle
from ssl_vit.modules.dvae import DVAEQuantiser
from ssl_vit.modules.feature_teacher import FeatureTeacher, FeatureTeacherSection
from ssl_vit.modules.tokenizer import EncoderTokenizer, TokenizerFile, load_tokenizer, save_tokenizer
from ssl_vit.modules.vqkd import VQKDQuantiser
from ssl_vit.objectives.base import Progress
from ssl_vit.objectives.tokenizer_training import TokenizerTraining
from ssl_vit.recipe import Recipe, check_recipe
from ssl_vit.run import run
from ssl_vit.training.metrics import read_metrics

ONE, ZERO = torch.ones(()), torch.zeros(())
START = Progress(0, 10, 0.0, 1.0, 0.0)


def vqkd(**changes: Any) -> TokenizerTraining:
    torch.manual_seed(0)
    teacher = FeatureTeacherSection(weights=teacher_folder())
    return TokenizerTraining(create_encoder(**TINY_ENCODER), **{**TINY_VQKD, "teacher": teacher, **changes})


def pictures(count: int = 4, size: int = 32) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


# ----------------------------------------------------------------------------------------------- codebook


def started(size: int = 7, dim: int = 5, **changes: Any) -> Codebook:
    torch.manual_seed(1)
    codebook = Codebook(size, dim, **changes).double()
    codebook.started.fill_(1)
    return codebook


def test_codes_move_by_the_released_formula() -> None:
    """A literal restatement with loops: unit features, nearest by distance, unit means, moving average, unit codes."""
    codebook = started(decay=0.9)
    features = [torch.randn(2, 6, 5, dtype=torch.float64) for _ in range(2)]
    codes = codebook.codes.clone()
    codebook.begin(first_step=True)
    found = [codebook(part) for part in features]
    codebook.step(ONE)

    members: dict[int, list[Tensor]] = {}
    for part, (quantised, commitment, numbers) in zip(features, found, strict=True):
        distances = 0.0
        for b in range(2):
            for n in range(6):
                z = part[b, n] / part[b, n].square().sum().sqrt()
                k = min(range(7), key=lambda k: float((z - codes[k]).square().sum()))
                assert numbers[b, n] == k
                torch.testing.assert_close(quantised[b, n], codes[k], rtol=1e-12, atol=1e-12)
                distances += float((z - codes[k]).square().sum())
                members.setdefault(k, []).append(z)
        assert float(commitment) == pytest.approx(distances / (2 * 6 * 5), rel=1e-10)
    for k in range(7):
        expected, share = codes[k], 0.0
        if k in members:
            mean = torch.stack(members[k]).mean(dim=0)
            expected = 0.9 * codes[k] + 0.1 * mean / mean.norm()
            expected, share = expected / expected.norm(), len(members[k]) / 24
        torch.testing.assert_close(codebook.codes[k], expected, rtol=1e-10, atol=1e-10)
        assert float(codebook.share[k]) == pytest.approx(0.9 / 7 + 0.1 * share, rel=1e-6)


def test_lookup_and_gradient_equal_the_library() -> None:
    """vector-quantize-pytorch with cosine similarity, its own update off: same codes, commitment and gradient."""
    library = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    theirs = library.VectorQuantize(
        dim=5, codebook_size=7, use_cosine_sim=True, rotation_trick=False, freeze_codebook=True, commitment_weight=1.0
    )
    codebook = started().float()
    codebook.codes.copy_(theirs.codebook)
    inputs = [torch.randn(2, 6, 5).requires_grad_() for _ in range(1)]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    ours, commitment, numbers = codebook(inputs[0])
    quantised, found, loss = theirs(F.normalize(inputs[1], dim=-1))
    assert torch.equal(numbers, found)
    torch.testing.assert_close(ours, quantised)
    torch.testing.assert_close(commitment, loss.squeeze())
    weights = torch.randn(2, 6, 5)
    ((ours * weights).sum() + commitment).backward()
    ((quantised * weights).sum() + loss.squeeze()).backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


def test_nothing_moves_in_a_skipped_step_or_in_evaluation() -> None:
    codebook = started(dead_below=0.9)
    before = {name: value.clone() for name, value in codebook.state_dict().items()}
    codebook.begin(first_step=True)
    codebook(torch.full((1, 3, 5), float("nan"), dtype=torch.float64))
    codebook.step(ZERO)
    codebook(torch.randn(2, 6, 5, dtype=torch.float64))
    codebook.step(ZERO)
    codebook.eval()
    codebook(torch.randn(2, 6, 5, dtype=torch.float64))
    codebook.step(ONE)
    for name, value in codebook.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_micro_batches_move_the_codes_as_one_batch() -> None:
    features = torch.randn(4, 6, 5, dtype=torch.float64)
    whole, parts = started(), started()
    for codebook, pieces in ((whole, [features]), (parts, list(features.split(1)))):
        codebook.begin(first_step=True)
        for piece in pieces:
            codebook(piece)
        codebook.step(ONE)
    torch.testing.assert_close(parts.codes, whole.codes, rtol=1e-12, atol=1e-12)


def test_dead_codes_come_back_as_features() -> None:
    """All features point one way; the codes that never win become features, the others stay where they are."""
    codebook = started(size=4, decay=0.5, dead_below=0.3)
    centre = F.normalize(torch.ones(5, dtype=torch.float64), dim=0)
    for step in range(8):  # the first winner, once others have taken its place, dies within 4 more
        codebook.begin(first_step=step == 0)
        features = centre + 0.01 * torch.randn(2, 6, 5, dtype=torch.float64)
        codebook(features)
        codebook.step(ONE)
    assert ((codebook.codes @ centre) > 0.99).all()
    torch.testing.assert_close(codebook.codes.norm(dim=1), torch.ones(4, dtype=torch.float64))
    never = started(size=4, decay=0.5)
    for step in range(3):
        never.begin(first_step=step == 0)
        never(features)
        never.step(ONE)
    assert ((never.codes @ centre) > 0.99).sum() <= 1


def test_the_first_features_start_the_codes_by_kmeans() -> None:
    """From one feature of each heap: k-means that is left to draw may also split one heap and join two."""
    torch.manual_seed(0)
    codebook = Codebook(3, 5)
    centres = torch.linalg.qr(torch.randn(5, 5))[0][:3]
    features = (centres[:, None] + 0.01 * torch.randn(3, 40, 5)).flatten(0, 1)[None]
    codebook.begin(first_step=True)
    with patch.object(codebook, "_drawn", lambda unit: unit[[5, 45, 85]]):
        _, commitment, numbers = codebook(features)
    assert numbers[0].tolist() == [0] * 40 + [1] * 40 + [2] * 40
    unit = F.normalize(features[0], dim=1)
    centred = unit.unflatten(0, (3, 40)) - F.normalize(unit.unflatten(0, (3, 40)).mean(dim=1, keepdim=True), dim=2)
    torch.testing.assert_close(commitment, centred.square().mean(), rtol=1e-4, atol=0)
    for k in range(3):
        mean = F.normalize(unit[numbers[0] == k].mean(dim=0), dim=0)
        torch.testing.assert_close(codebook.codes[k], mean, atol=1e-5, rtol=0)
    assert codebook.started
    codes = codebook.codes.clone()
    codebook.begin(first_step=True)
    codebook(torch.randn(1, 9, 5))
    assert torch.equal(codebook.codes, codes), "only once, also when step 0 is run again"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 1}, "codebook_size=1"),
        ({"dim": 0}, "code_dim=0"),
        ({"decay": 1.0}, r"decay=1\.0"),
        ({"dead_below": 1.0}, r"dead_below=1\.0"),
    ],
)
def test_mistakes_of_the_codebook_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Codebook(**{"size": 4, "dim": 2, **arguments})


# ----------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["vqkd", "dvae"])
def test_a_file_gives_the_same_codes(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = create_encoder(**TINY_ENCODER)
    quantiser = VQKDQuantiser(48, 16, 8) if kind == "vqkd" else DVAEQuantiser(48, 16, 8)
    tokenizer = EncoderTokenizer(encoder, quantiser, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)).eval()
    facts = save_tokenizer(tokenizer, tmp_path)
    assert facts["sha256"] == hashlib.sha256((tmp_path / "tokenizer.safetensors").read_bytes()).hexdigest()
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == facts
    image = pictures()
    expected = tokenizer.tokens(image)
    assert expected.shape == (4, 16)
    assert expected.dtype == torch.int64
    assert len(expected.unique()) > 1
    for path in (tmp_path, tmp_path / "tokenizer.safetensors"):
        again = load_tokenizer(TokenizerFile(path=str(path), sha256=facts["sha256"].upper()))
        assert not again.training
        assert not any(p.requires_grad for p in again.parameters())
        assert torch.equal(again.tokens(image), expected)
        assert torch.equal(again.tokens(image.float() / 255), expected), "uint8 or [0, 1]"
    normalised = (image.float() / 255 - torch.tensor([0.4, 0.5, 0.6]).view(-1, 1, 1)) / torch.tensor(
        [0.2, 0.3, 0.4]
    ).view(-1, 1, 1)
    patches = encoder(normalised).patches
    by_hand = (
        (F.normalize(quantiser.project(patches), dim=-1) @ quantiser.codebook.codes.T).argmax(-1)
        if isinstance(quantiser, VQKDQuantiser)
        else quantiser.to_logits(patches).argmax(-1)
    )
    assert torch.equal(by_hand, expected)


def test_a_tokenizer_is_pinned_by_its_hash(tmp_path: Path) -> None:
    chosen = tokenizer_file()
    digest, path = chosen["sha256"], chosen["path"]
    other = "0" * 64
    with pytest.raises(ValueError, match=rf"tokenizer\.sha256={other}: .* has {digest}"):
        load_tokenizer(TokenizerFile(path=path, sha256=other))
    with pytest.raises(ValueError, match=rf"is required.*tokenizer\.sha256={digest}"):
        load_tokenizer(TokenizerFile(path=path))
    with pytest.raises(ValueError, match=r"tokenizer\.path: is required: train a tokenizer with pipelines/train_tok"):
        load_tokenizer(TokenizerFile())
    with pytest.raises(ValueError, match=r"/nowhere: no such file.*nothing is downloaded"):
        load_tokenizer(TokenizerFile(path="/nowhere", sha256=other))
    changed = (Path(path) / "tokenizer.safetensors").read_bytes()[:-4] + b"\0\0\0\1"
    (tmp_path / "tokenizer.safetensors").write_bytes(changed)
    with pytest.raises(ValueError, match=f"{digest}.*another tokenizer"):
        load_tokenizer(TokenizerFile(path=str(tmp_path), sha256=digest))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(1, 3, 40, 32, dtype=torch.uint8), r"takes \(B, 3, 32, 32\)"),
        (torch.zeros(1, 1, 32, 32, dtype=torch.uint8), r"takes \(B, 3, 32, 32\)"),
        (torch.full((1, 3, 32, 32), -1.5), r"values from -1\.5 to -1\.5.*should not be normalised"),
        (torch.full((1, 3, 32, 32), 255.0), r"values from 255"),
    ],
)
def test_size_and_range_of_the_input_are_checked(image: Tensor, message: str) -> None:
    tokenizer = load_tokenizer(TokenizerFile(**tokenizer_file()))
    with pytest.raises(ValueError, match=message):
        tokenizer.tokens(image)


# ----------------------------------------------------------------------------------------------- DALL-E's encoder


def dalle_by_hand(state: dict[str, Tensor], image: Tensor, blocks: int = 2) -> Tensor:
    """The published encoder restated with its key names: 7x7 input, 4 groups, pooling between, gain 1 / layers^2."""

    def conv(name: str, x: Tensor) -> Tensor:
        w = state[f"{name}.w"]
        return F.conv2d(x, w, state[f"{name}.b"], padding=(w.shape[-1] - 1) // 2)

    x = conv("blocks.input", image * 0.8 + 0.1)
    for group in range(1, 5):
        for block in range(1, blocks + 1):
            name = f"blocks.group_{group}.block_{block}"
            inner = x
            for i in range(1, 5):
                inner = conv(f"{name}.res_path.conv_{i}", inner.clamp_min(0))
            x = (conv(f"{name}.id_path", x) if f"{name}.id_path.w" in state else x) + inner / (4 * blocks) ** 2
        if group < 4:
            x = F.max_pool2d(x, 2)
    return conv("blocks.output.conv", x.clamp_min(0))


def small_dalle() -> DalleTokenizer:
    torch.manual_seed(0)
    tokenizer = DalleTokenizer(img_size=(16, 24), width=16, vocab_size=64)
    for parameter in tokenizer.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter)
    return tokenizer


def test_dalle_encoder_equals_the_published_formulas(tmp_path: Path) -> None:
    tokenizer = small_dalle().double()
    pixels = torch.rand(2, 3, 16, 24, dtype=torch.float64)
    expected = dalle_by_hand(dict(tokenizer.state_dict()), pixels)
    found = tokenizer.logits(pixels)
    assert float(((found - expected).abs().max() / expected.abs().max()).detach()) < 1e-10
    assert torch.equal(tokenizer.tokens(pixels), expected.argmax(dim=1).flatten(1))
    assert tokenizer.grid_size == (2, 3)


def test_dalle_encoder_has_the_published_names_and_size() -> None:
    with torch.device("meta"):
        tokenizer = DalleTokenizer()
    state = tokenizer.state_dict()
    assert tokenizer.grid_size == (14, 14)
    convolutions = [(3, 256, 7), (2048, 8192, 1)]
    for before, after in ((256, 256), (256, 512), (512, 1024), (1024, 2048)):
        convolutions += [(before, after, 1)] if before != after else []
        for inputs in (before, after):
            hidden = after // 4
            convolutions += [(inputs, hidden, 3), (hidden, hidden, 3), (hidden, hidden, 3), (hidden, after, 1)]
    expected = sum(inputs * outputs * side**2 + outputs for inputs, outputs, side in convolutions)
    assert sum(t.numel() for t in state.values()) == expected
    names = ("input.w", "group_1.block_1.res_path.conv_1.w", "group_4.block_2.res_path.conv_4.b", "output.conv.w")
    for name in (f"blocks.{part}" for part in (*names, "group_2.block_1.id_path.w")):
        assert name in state
    assert "blocks.group_1.block_1.id_path.w" not in state
    assert state["blocks.output.conv.w"].shape == (8192, 2048, 1, 1)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_dalle_weights_load_from_a_local_file(tmp_path: Path, suffix: str) -> None:
    tokenizer, file = small_dalle(), tmp_path / f"dalle_encoder{suffix}"
    state = {name: tensor.contiguous() for name, tensor in tokenizer.state_dict().items()}
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    again = load_tokenizer(TokenizerFile(path=str(file), sha256=digest))
    again.take((16, 24))
    image = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    assert torch.equal(again.tokens(image), tokenizer.tokens(image))
    with pytest.raises(ValueError, match=r"target_size=\[20, 24\]: should be multiples of 8"):
        again.take((20, 24))


class WholeModule(nn.Module):
    """A module as the published pickle holds one."""


def test_the_published_pickle_is_refused_with_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "encoder.pkl"
    torch.save(WholeModule(), file)
    with pytest.raises(ValueError, match=r"whole module is refused.*save_file\(.*load_model\(.*dalle_encoder\.saf"):
        load_dalle(file, "tokenizer")
    file.write_bytes(pickle.dumps(WholeModule(), protocol=2))
    with pytest.raises(ValueError, match=r"whole module is refused"):
        load_dalle(file, "tokenizer")
    torch.save({"weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=r"neither a tokenizer\.safetensors.*its names: weight"):
        load_dalle(file, "tokenizer")
    state = dict(small_dalle().state_dict())
    del state["blocks.group_3.block_2.res_path.conv_2.b"]
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"not DALL-E's encoder.*group_3\.block_2\.res_path\.conv_2\.b"):
        load_dalle(file, "tokenizer")


# ----------------------------------------------------------------------------------------------- teachers


def test_our_export_is_a_teacher_with_its_own_normalisation() -> None:
    teacher = FeatureTeacher(FeatureTeacherSection(weights=teacher_folder()), (4, 4), 3).eval()
    model = timm.create_model(f"local-dir:{teacher_folder()}", pretrained=True).eval()
    pixels = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(-1, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(-1, 1, 1)
    expected = model.forward_features((pixels - mean) / std)[:, 1:]
    torch.testing.assert_close(teacher(pixels), expected, rtol=1e-5, atol=1e-5)
    assert teacher.dim == 36


@pytest.mark.parametrize(
    ("name", "side"),
    [("vit_tiny_patch16_224", 14), ("vit_tiny_patch16_224", 4), ("resnet18", 4), ("vit_base_patch16_clip_224", 14)],
)
def test_any_timm_model_is_a_teacher(name: str, side: int, tmp_path: Path) -> None:
    """Pictures, and positions, become as large as gives a ViT one patch a code; maps of convolutions are resized; CLIP
    projects."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    torch.manual_seed(0)
    project = "clip" in name
    model = timm.create_model(name, num_classes=24)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "weights.safetensors")
    section = FeatureTeacherSection(
        weights=str(tmp_path / "weights.safetensors"), name=name, project=project,
        img_size=None if "vit" in name else 64,
    )  # fmt: skip
    teacher = FeatureTeacher(section, (side, side), 3).eval()
    assert teacher.img_size == (16 * side, 16 * side)
    if "vit" in name:
        weights, model = model.state_dict(), timm.create_model(name, num_classes=24, img_size=16 * side)
        model.load_state_dict(checkpoint_filter_fn(weights, model))
    pixels = torch.rand(1, 3, *teacher.img_size)
    config = model.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    features = model.eval().forward_features((pixels - mean) / std)
    if name == "resnet18":
        features = F.interpolate(features, (4, 4), mode="bilinear").flatten(2).transpose(1, 2)
    else:
        features = features[:, 1:]
    expected = model.head(features) if project else features
    torch.testing.assert_close(teacher(pixels), expected, rtol=1e-5, atol=1e-5)
    assert teacher.dim == (24 if project else model.num_features)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, r"teacher\.weights=None: VQ-KD needs a trained teacher"),
        ({"weights": "/nowhere"}, r"teacher\.weights=/nowhere: .*no such file"),
        ({"weights": "/nowhere", "name": "vit_tny_patch16_224"}, "did you mean 'vit_tiny_patch16_224'"),
        ({"project": True}, "only for timm models"),
        ({"mean": (0.5,), "std": (0.5,)}, "one number for each of 3 channels"),
    ],
)
def test_teachers_that_cannot_be_are_refused(section: dict[str, Any], message: str) -> None:
    if section and "weights" not in section:
        section = {**section, "weights": teacher_folder()}
    with pytest.raises(ValueError, match=message):
        FeatureTeacher(FeatureTeacherSection(**section), (4, 4), 3)


# ----------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_vqkd_loss_is_the_papers(dtype: torch.dtype, bound: float) -> None:
    """1 - cosine of regressed and teacher's features plus the commitment; loss and gradients."""
    objective = vqkd(commitment=0.7).to(dtype).train()
    objective.before_step(START)
    pixels = torch.rand(4, 3, 32, 32, dtype=dtype)
    objective({"target_image": pixels})  # starts the codes
    loss, metrics = objective({"target_image": pixels})
    patches = objective.encoder(pixels * 2 - 1).patches
    z = F.normalize(objective.quantiser.project(patches), dim=-1)
    codes = objective.quantiser.codebook.codes
    numbers = (z[:, :, None] - codes).square().sum(-1).argmin(-1)
    q = codes[numbers]
    rebuilt = objective.decoder(z + (q - z).detach())
    mean, std = (torch.tensor(v, dtype=dtype).view(-1, 1, 1) for v in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]))
    target = objective.teacher.model((pixels - mean) / std).patches
    cosine = (rebuilt / rebuilt.norm(dim=-1, keepdim=True) * target / target.norm(dim=-1, keepdim=True)).sum(-1)
    expected = (1 - cosine).mean() + 0.7 * (z - q).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=bound)
    assert metrics["cosine"].item() == pytest.approx(cosine.mean().item(), rel=bound)
    trained = [p for p in objective.parameters() if p.requires_grad]
    gradients = (torch.autograd.grad(value, trained) for value in (loss, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=bound * float(theirs.abs().max()))
    assert float(metrics["usage"]) == pytest.approx(len(numbers.unique()) / 32)
    share = torch.bincount(numbers.flatten(), minlength=32) / numbers.numel()
    assert float(metrics["perplexity"]) == pytest.approx(math.exp(-sum(p * math.log(p) for p in share.tolist() if p)))


def test_vqkd_trains_encoder_decoder_and_codes_and_not_its_teacher() -> None:
    objective = vqkd().train()
    assert not objective.teacher.training
    objective.before_step(START)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.1)
    loss, _ = objective({"target_image": pictures()})
    loss.backward()
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    optimizer.step()
    objective.after_step(ONE)
    moved = {name for name, value in objective.state_dict().items() if not torch.equal(value, before[name])}
    still = set(before) - moved
    assert {name for name in still if not name.startswith("teacher.")} == {"encoder.model.pos_embed"}
    assert not [name for name in moved if name.startswith("teacher.")]


def test_dvae_schedules_and_loss() -> None:
    torch.manual_seed(0)
    objective = TokenizerTraining(create_encoder(**TINY_ENCODER), **{**TINY_TOKENIZER, "kl_weight": 0.5})
    seen = []
    for fraction in (0.0, 0.25, 0.5, 1.0):
        objective.before_step(Progress(0, 10, 0.0, 1.0, fraction))
        seen.append((objective.quantiser.temperature, objective.kl_now))
    assert seen == [
        (1.0, 0.0),
        (pytest.approx((1 + 0.0625) / 2), pytest.approx(0.25)),
        (pytest.approx(0.0625), pytest.approx(0.5)),
        (pytest.approx(0.0625), pytest.approx(0.5)),
    ]
    objective = objective.double().train()
    image = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    torch.manual_seed(3)
    loss, metrics = objective({"target_image": image})
    pixels = image * 2 - 1
    logits = objective.quantiser.to_logits(objective.encoder(pixels).patches)
    torch.manual_seed(3)
    gumbel = -torch.empty_like(logits).exponential_().log()
    weights = ((logits + gumbel) / 0.0625).softmax(-1)
    rebuilt = objective.decoder(weights @ objective.quantiser.codes)
    q = logits.softmax(-1)
    divergence = (q * (q * 32).log()).sum((1, 2)).mean() / (3 * 32 * 32)
    expected = (rebuilt - pixels).square().mean() + 0.5 * divergence
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert metrics["divergence"].item() == pytest.approx(divergence.item(), rel=1e-10)


def test_dvae_learns_its_pictures() -> None:
    torch.manual_seed(0)
    small = {**TINY_TOKENIZER, "decoder_embed_dim": 48, "anneal": 1.0}
    objective = TokenizerTraining(create_encoder(**TINY_ENCODER), **small).train()
    colours = torch.randint(0, 256, (16, 3, 4, 4), dtype=torch.uint8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr=3e-3)
    errors = []
    for step in range(150):
        objective.before_step(Progress(step, 150, 0.0, 1.0, step / 150))
        loss, metrics = objective({"target_image": colours})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        errors.append(float(metrics["error"]))
    assert errors[-1] < errors[0] / 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "vqdk"}, "kind='vqdk'.*did you mean 'vqkd'"),
        ({"kind": "vqkd", "decoder_num_heads": 2}, r"objective\.kind=dvae"),
        ({"codebook_size": 1}, "codebook_size=1"),
        ({"decoder_depth": 0}, "decoder_depth=0"),
        ({"temperature": (0.0, 1.0)}, r"temperature=\[0\.0"),
        ({"anneal": 2.0}, r"anneal=2\.0"),
    ],
)
def test_mistakes_of_the_training_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizerTraining(create_encoder(**TINY_ENCODER), **{**TINY_TOKENIZER, **arguments})


def recipe_of(images: Path, folder: Path, **objective: Any) -> dict[str, Any]:
    chosen = {**TINY_VQKD, "teacher": {"weights": teacher_folder()}, **objective}
    return tiny_recipe(
        images, folder, objective={"name": "tokenizer_training", **chosen}, evals={"codebook": {"every": "6 steps"}}
    )


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "run"
    values = recipe_of(images, folder)
    values["data"] |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    run(check_recipe(check(Recipe, values)))
    return folder


def test_a_run_leaves_a_pinned_tokenizer_and_its_numbers(trained: Path, images: Path) -> None:
    result = json.loads((trained / "result.json").read_text())
    facts = result["tokenizer"]
    assert facts == json.loads((trained / "tokenizer" / "tokenizer.json").read_text())
    tokenizer = load_tokenizer(TokenizerFile(path=str(trained), sha256=facts["sha256"]))
    final = result["evaluations"]["final"]
    files = sorted(images.rglob("*.png"))
    image = torch.stack([torch.from_numpy(np.asarray(Image.open(f)).copy()).permute(2, 0, 1) for f in files])
    codes = tokenizer.tokens(image)
    share = torch.bincount(codes.flatten(), minlength=32) / codes.numel()
    assert final["codebook/usage"] == pytest.approx(float((share > 0).float().mean()))
    assert final["codebook/commonest"] == pytest.approx(float(share.max()))
    assert final["codebook/perplexity"] == pytest.approx(math.exp(final["codebook/entropy"]))
    assert final["codebook/cosine"] > result["evaluations"]["initial"]["codebook/cosine"] + 0.1
    log = (trained / "train.log").read_text()
    assert f"objective.tokenizer.sha256={facts['sha256']}" in log
    lines = [line for line in read_metrics(trained / "metrics.jsonl") if "loss" in line]
    assert {"usage", "perplexity", "cosine", "commitment"} <= lines[-1].keys()


def test_a_resumed_run_is_bit_for_bit_the_same(trained: Path, images: Path, tmp_path: Path) -> None:
    """Codes, their shares and the revival of dead ones come back from a checkpoint in mid-run."""
    values = recipe_of(images, tmp_path / "again")
    values["data"] |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    run(check_recipe(check(Recipe, values)), resume=str(trained / "checkpoints" / "step_00000008"))
    again, straight = (
        [(v["step"], v["loss"]) for v in read_metrics(f / "metrics.jsonl") if "loss" in v]
        for f in (tmp_path / "again", trained)
    )
    assert again == straight[8:]
    digests = [
        json.loads((f / "result.json").read_text())["tokenizer"]["sha256"] for f in (tmp_path / "again", trained)
    ]
    assert digests[0] == digests[1]


@pytest.mark.processes
def test_two_processes_train_like_one(images: Path, tmp_path: Path) -> None:
    """Codebook sums go over processes and micro-batches: from the same codes (their start is drawn) the same losses."""
    losses, shares = {}, {}
    for name, launcher, words in (
        ("one", [], []),
        ("two", ["-m", "torch.distributed.run", "--nproc_per_node", "2"], []),
        ("onwards", ["-m", "torch.distributed.run", "--nproc_per_node", "2"],
         ["--resume", str(tmp_path / "one" / "checkpoints" / "step_00000002")]),
    ):  # fmt: skip
        values = recipe_of(images, tmp_path / name, dead_below=0.0)
        values["run"] |= {"micro_batch_size": 4, "save_every": "2 steps", "keep_last": 20}
        values["evals"] = {"codebook": {}}
        (tmp_path / f"{name}.yaml").write_text(to_yaml(values))
        done = run_python(
            *launcher, "pipelines/train_tokenizer.py", "--config", str(tmp_path / f"{name}.yaml"), *words,
            env={"ACCELERATE_USE_CPU": "true"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        losses[name] = [line["loss"] for line in lines if "loss" in line]
        shares[name] = lines[0].get("codebook/usage"), lines[0].get("codebook/cosine")
    assert len(losses["two"]) == 12
    assert shares["two"] == pytest.approx(shares["one"], rel=1e-5), "the same evaluation of the same start"
    assert losses["onwards"] == pytest.approx(losses["one"][2:], rel=1e-5)


def test_constant_pictures_raise_the_usage_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B77."""
    for i in range(32):
        target = tmp_path / "images" / f"class_{i % 2}"
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), 128, dtype=np.uint8)).save(target / f"{i}.png")
    monkeypatch.setattr(logging.getLogger("ssl_vit"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="ssl_vit"):
        run(check_recipe(check(Recipe, recipe_of(tmp_path / "images", tmp_path / "run"))))
    assert [
        r.message for r in caplog.records if "codebook: usage 0." in r.message and "targets are nearly" in r.message
    ]


def test_the_codebook_evaluation_refuses_other_objectives(images: Path, tmp_path: Path) -> None:
    values = tiny_recipe(images, tmp_path / "run", evals={"codebook": {}})
    with pytest.raises(InputError, match=r"evals\.codebook: needs objective\.name=tokenizer_training or beit"):
        run(check_recipe(check(Recipe, values)))


def test_a_teacher_of_a_recipe_is_checked_before_anything_starts(images: Path, tmp_path: Path) -> None:
    recipe = check_recipe(check(Recipe, recipe_of(images, tmp_path, teacher={"weights": "/nowhere"})))
    with pytest.raises(InputError, match=r"objective: teacher\.weights=/nowhere"):
        build_objective(recipe)
    with pytest.raises(InputError, match=r"objective\.teacher\.weihgts.*did you mean 'weights'"):
        check_recipe(check(Recipe, recipe_of(images, tmp_path, teacher={"weihgts": "x"})))


def test_ordered_dict_of_tensors_is_a_state_dict(tmp_path: Path) -> None:
    file = tmp_path / "dalle.pt"
    torch.save(OrderedDict(small_dalle().state_dict()), file)
    assert load_dalle(file, "tokenizer").vocab_size == 64
