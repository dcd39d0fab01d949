"""ComfyUI's own detection over headers: the same class, configuration and sampling as for the file itself."""

from __future__ import annotations

from typing import Any

import pytest

import real_comfyui  # noqa: F401  # isort: skip
import comfy.model_base
import comfy.model_detection
import comfy.utils
import torch
from torch_server import PREFIX, SD1, SDXL, names_and_shapes

from unetd import skeleton
from unetd.client import Patience, TensorInfo
from unetd.refusals import CannotRunRemotely

SD15 = {
    **SD1,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
}
SD2 = {
    **SD15,
    "context_dim": 1024,
    "use_linear_in_transformer": True,
    "num_heads": -1,
    "num_head_channels": 64,
}
MARK = TensorInfo("F32", (0,))


def built(
    header: dict[str, TensorInfo],
    values: dict[str, torch.Tensor] | None = None,
    as_checkpoint: bool = True,
    dtype: torch.dtype = torch.float16,
) -> Any:
    where = skeleton.Remote(None, "model.safetensors", Patience("error"))  # type: ignore[arg-type]
    recognised = skeleton.recognise("model.safetensors", header, as_checkpoint)
    return skeleton.build(recognised, values or {}, dtype, where)


@pytest.mark.parametrize("in_channels", [4, 9])
def test_sd15_and_its_inpainting_model(in_channels: int) -> None:
    header = names_and_shapes({**SD15, "in_channels": in_channels})
    model = built(header, dict.fromkeys(header, torch.zeros(320)))
    assert type(model) is comfy.model_base.BaseModel
    assert model.model_config.unet_config["num_heads"] == 8
    assert model.concat_keys == (() if in_channels == 4 else ("mask", "masked_image"))
    assert (model.get_dtype(), model.manual_cast_dtype) == (torch.float16, None)
    assert model.memory_required([2, 4, 64, 64]) == 0
    assert len(model.diffusion_model.state_dict(prefix="x.")) == len(names_and_shapes(SD15))


def test_sdxl_encodes_its_vector_from_the_prompt() -> None:
    model = built(names_and_shapes(SDXL))
    assert type(model) is comfy.model_base.SDXL
    assert model.encode_adm(pooled_output=torch.zeros(1, 1280)).shape == (1, 2816)
    assert model.model_type == comfy.model_base.ModelType.EPS


@pytest.mark.parametrize(
    ("marks", "kind"),
    [
        (["v_pred"], comfy.model_base.ModelType.V_PREDICTION),
        (["v_pred", "ztsnr"], comfy.model_base.ModelType.V_PREDICTION),
        (["edm_mean", "edm_std"], comfy.model_base.ModelType.EDM),
    ],
)
def test_marks_in_a_checkpoint_decide_how_it_samples(marks: list[str], kind: Any) -> None:
    model = built({**names_and_shapes(SDXL), **{mark: MARK for mark in marks}})
    assert model.model_type == kind
    assert model.model_config.sampling_settings.get("zsnr", False) == ("ztsnr" in marks)


def test_the_sigmas_of_a_checkpoint_are_read_by_value() -> None:
    values = {"edm_vpred.sigma_max": torch.tensor(100.0), "edm_vpred.sigma_min": torch.tensor(0.01)}
    header = {**names_and_shapes(SDXL), **dict.fromkeys(values, TensorInfo("F32", ()))}
    assert set(skeleton.recognise("model.safetensors", header, True).probes) == set(values)
    model = built(header, values)
    assert model.model_type == comfy.model_base.ModelType.V_PREDICTION_EDM
    assert float(model.model_sampling.sigma_max) == pytest.approx(100.0)


@pytest.mark.parametrize(("spread", "kind"), [(0.01, "EPS"), (0.2, "V_PREDICTION")])
@pytest.mark.parametrize("layout", ["checkpoint", "ldm", "diffusers"])
def test_sd2_is_told_by_one_bias_in_every_layout(layout: str, spread: float, kind: str) -> None:
    bias = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    header = names_and_shapes(SD2, PREFIX if layout == "checkpoint" else "")
    if layout == "diffusers":
        header = in_diffusers_layout(header, SD2)
    (name,) = skeleton.recognise("model.safetensors", header, layout == "checkpoint").probes.values()
    assert name.endswith(bias) or name == "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
    values = {name: torch.linspace(-2 * spread, 2 * spread, 320)}
    model = built(header, values, as_checkpoint=layout == "checkpoint")
    assert model.model_type.name == kind
    assert set(model.state_dict()) >= {f"diffusion_model.{key}" for key in names_and_shapes(SD2, "")}


def in_diffusers_layout(header: dict[str, TensorInfo], config: dict[str, Any]) -> dict[str, TensorInfo]:
    theirs = comfy.utils.unet_to_diffusers(config)
    return {name: header[ours] for name, ours in theirs.items() if ours in header}


def test_a_checkpoint_loaded_as_a_diffusion_model_has_no_marks_as_in_comfyui() -> None:
    header = {**names_and_shapes(SDXL), "v_pred": MARK}
    model = built(header, as_checkpoint=False)
    assert model.model_type == comfy.model_base.ModelType.EPS


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"lora_unet_x.lora_up.weight": TensorInfo("F16", (1, 1))}, "recognises no diffusion model"),
        (
            {
                "double_blocks.0.img_attn.norm.key_norm.scale": TensorInfo("BF16", (128,)),
                "img_in.weight": TensorInfo("BF16", (3072, 64)),
                "img_in.bias": TensorInfo("BF16", (3072,)),
                "txt_in.weight": TensorInfo("BF16", (3072, 4096)),
                "vector_in.in_layer.weight": TensorInfo("BF16", (3072, 768)),
                "single_blocks.0.norm.key_norm.scale": TensorInfo("BF16", (128,)),
            },
            "it is a Flux.* model.*UNets",
        ),
        (
            {
                **names_and_shapes({**SD15, "in_channels": 8}),
                "cc_projection.weight": TensorInfo("F16", (768, 772)),
                "cc_projection.bias": TensorInfo("F16", (768,)),
            },
            "Stable_Zero123 needs weights beside",
        ),
        (
            {**names_and_shapes(SD15), f"{PREFIX}scaled_fp8": TensorInfo("F8_E4M3", (0,))},
            "fp8 with scales",
        ),
    ],
)
def test_other_families_are_refused_by_name(header: dict[str, TensorInfo], message: str) -> None:
    with pytest.raises(CannotRunRemotely, match=f'(?s)"model.safetensors".*{message}.*Load Checkpoint'):
        skeleton.recognise("model.safetensors", header, as_checkpoint=True)
