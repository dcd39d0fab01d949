"""Model files for the tests on the real ComfyUI, in ComfyUI's own folder layout under .cache/comfyui/models.

Names and shapes come from ComfyUI's modules on the `meta` device, numbers from the generator of the references
(test/reference/weights.py), so every file is the same on every machine. What ComfyUI's detection pins is kept (320
channels, context 768 or 2048, the depths that tell SDXL), levels and the rest are as few as it accepts.
Files that exist already are kept while this script and the generator are unchanged.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REFERENCE = Path(__file__).resolve().parents[1] / "reference"
sys.path.insert(0, str(REFERENCE))

# `adapters` comes first: it puts ComfyUI on the path and reads its arguments.
import adapters  # noqa: E402
import architectures  # noqa: E402
import comfy.cldm.cldm  # noqa: E402
import comfy.clip_model  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.t2i_adapter.adapter  # noqa: E402
import comfy.taesd.taesd  # noqa: E402
import comfy_unet  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

ROOT = comfy_unet.ROOT / ".cache/comfyui/models"
Tensors = dict[str, torch.Tensor]


def sd1(levels: int, in_channels: int = 4) -> dict[str, Any]:
    return architectures.unet(
        in_channels=in_channels,
        model_channels=320,
        mult=[1, 2][:levels],
        res=[1] * levels,
        depth=[1] * levels,
        depth_out=[1] * (2 * levels),
        middle=1,
        context=768,
        linear=False,
    )


#: Three levels of 320 channels. The depths of the input blocks are those that ComfyUI knows SDXL by.
SDXL = architectures.unet(
    model_channels=320,
    mult=[1, 1, 1],
    res=[2, 2, 2],
    depth=[0, 0, 2, 2, 10, 10],
    depth_out=[0, 0, 0, 1, 1, 1, 1, 1, 1],
    middle=1,
    context=2048,
    linear=True,
    adm=2816,
)
UNETS: Mapping[str, dict[str, Any]] = {
    "sd15-one-level": sd1(1),
    "sd15": sd1(2),
    "sd15-inpaint": sd1(2, in_channels=9),
    "sdxl": SDXL,
    "sd15-full": next(each.arguments for each in architectures.FULL if each.name == "sd15"),
}
#: UNet -> the LoRA files made for it, from the table of test/reference/adapters.py.
LORAS: Mapping[str, tuple[str, ...]] = {"sd15": ("style", "subject", "peft", "locon"), "sdxl": ("style",)}
#: Of the latents that each decodes, as ComfyUI sets them.
TAESD_SCALES: Mapping[str, float] = {"taesd": 0.18215, "taesdxl": 0.13025}


def write(path: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """F16: the generator's values are exact in it. The file appears whole or not at all."""
    target = ROOT / path
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    save_file({name: value.half().contiguous() for name, value in tensors.items()}, part)
    part.replace(target)
    print(f"models: {path}, {target.stat().st_size / 1e6:.1f} MB", flush=True)


def read(path: str, prefix: str = "") -> Tensors:
    """What `write` wrote, its names behind `prefix`."""
    return {prefix + name: value for name, value in load_file(ROOT / f"{path}.safetensors").items()}


def generated(shapes: Mapping[str, torch.Tensor], prefix: str = "") -> Tensors:
    """Values for every tensor of a state dict on `meta`; `prefix` makes two modules of one kind differ."""
    return {name: comfy_unet.tensor(prefix + name, tuple(value.shape)) for name, value in shapes.items()}


def unets() -> None:
    for name, arguments in UNETS.items():
        model = comfy_unet.build(arguments)
        manifest = comfy_unet.manifest_of(model)
        tensors = {f"model.diffusion_model.{k}": comfy_unet.tensor(k, shape) for k, shape in manifest.items()}
        write(f"checkpoints/{name}.safetensors", tensors)
        if name == "sd15":
            bare = {k.removeprefix("model.diffusion_model."): value for k, value in tensors.items()}
            write(f"diffusion_models/{name}-unet.safetensors", bare)
        if name in LORAS:
            table = adapters.files(manifest, comfy_unet.diffusers_names(arguments, manifest), LORAS[name])
            for lora, file in table.items():
                write(f"loras/{name}-{lora}.safetensors", file.state_dict())
            if name == "sd15":
                both = {**table["style"].state_dict(), **text_encoder_lora()}
                write(f"loras/{name}-style-and-text.safetensors", both)


def text_encoder_lora() -> Tensors:
    """The text encoder's part of a LoRA, as kohya's trainer names it."""
    tensors: Tensors = {}
    for layer in range(12):
        for module, shape in (("self_attn_q_proj", (768, 768)), ("mlp_fc1", (3072, 768))):
            prefix = f"lora_te_text_model_encoder_layers_{layer}_{module}"
            rows, columns = shape
            tensors[f"{prefix}.lora_down.weight"] = comfy_unet.tensor(f"#{prefix}.lora_down.weight", (4, columns))
            tensors[f"{prefix}.lora_up.weight"] = comfy_unet.tensor(f"#{prefix}.lora_up.weight", (rows, 4))
            tensors[f"{prefix}.alpha"] = torch.tensor(4.0)
    return tensors


def clip() -> None:
    config = {
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "max_position_embeddings": 77,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "vocab_size": 49408,
        "eos_token_id": 49407,
    }
    meta = torch.device("meta")
    model = comfy.clip_model.CLIPTextModel(config, torch.float32, meta, comfy.ops.disable_weight_init)
    names = {k: v for k, v in model.state_dict().items() if k.startswith("text_model.")}
    write("text_encoders/clip_l.safetensors", generated(names))


def controlnet() -> None:
    arguments = {**UNETS["sd15"], "hint_channels": 3, "device": torch.device("meta"), "dtype": torch.float32}
    del arguments["out_channels"]
    model = comfy.cldm.cldm.ControlNet(**arguments, operations=comfy.ops.disable_weight_init)
    write("controlnet/sd15.safetensors", generated(model.state_dict(), "control/"))


def t2i_adapter() -> None:
    """For sd15-full: its features fit four levels."""
    with torch.device("meta"):
        model = comfy.t2i_adapter.adapter.Adapter_light(cin=192, nums_rb=4)
    write("controlnet/t2i-sd15-full.safetensors", generated(model.state_dict(), "t2i/"))


def taesd() -> None:
    """A VAE of random weights whose pictures are neither constant nor saturated: the last layer is scaled to that."""
    torch.manual_seed(1)
    for name, scale in TAESD_SCALES.items():
        for part, make, inputs, mean, std in (
            ("decoder", comfy.taesd.taesd.Decoder, 3 * torch.randn(4, 4, 16, 16), 0.5, 0.12),
            ("encoder", comfy.taesd.taesd.Encoder, torch.rand(4, 3, 128, 128), 0.0, 5 * scale),
        ):
            with torch.device("meta"):
                shapes = make().state_dict()
            model = make()
            fans = {k: math.prod(v.shape[1:]) for k, v in shapes.items()}
            values = {
                k: (torch.rand(v.shape) - 0.5) * (2 * math.sqrt(3 / fans[k])) if v.dim() > 1 else torch.zeros(v.shape)
                for k, v in shapes.items()
            }
            model.load_state_dict(values)
            output = model(inputs)
            last = max(shapes, key=lambda k: int(k.split(".")[0])).split(".")[0]
            channels = (0, 2, 3)
            factor = std / output.std(channels)
            values[f"{last}.weight"] *= factor[:, None, None, None]
            values[f"{last}.bias"] = mean - output.mean(channels) * factor
            write(f"vae_approx/{name}_{part}.safetensors", values)


def whole() -> None:
    """Checkpoints with all their parts, as they are published; SDXL's without text encoders, which would be 1.6 GB."""
    text = read("text_encoders/clip_l", "cond_stage_model.transformer.")
    for name, vae, clip in (("sd15", "taesd", text), ("sd15-inpaint", "taesd", text), ("sdxl", "taesdxl", {})):
        parts = {
            **read(f"checkpoints/{name}"),
            **clip,
            **read(f"vae_approx/{vae}_encoder", "first_stage_model.taesd_encoder."),
            **read(f"vae_approx/{vae}_decoder", "first_stage_model.taesd_decoder."),
            "first_stage_model.vae_scale": torch.tensor(TAESD_SCALES[vae]),
            "first_stage_model.vae_shift": torch.tensor(0.0),
        }
        write(f"checkpoints/{name}-whole.safetensors", parts)


def stamp() -> str:
    """Changes with whatever decides the numbers."""
    used = ("adapters", "architectures", "comfy_unet", "weights")
    sources = [Path(__file__), *(REFERENCE / f"{name}.py" for name in used)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def main() -> None:
    mark = ROOT.parent / "models.stamp"
    if mark.exists() and mark.read_text() == stamp():
        print(f"models: {ROOT} is up to date")
        return
    mark.unlink(missing_ok=True)
    for make in (unets, clip, controlnet, t2i_adapter, taesd, whole):
        make()
    mark.write_text(stamp())


if __name__ == "__main__":
    main()
