"""The other side of weights_peer.rs: PyTorch and MONAI write weight files, and load what this program wrote.

weights_peer.py make DIR    one folder a network: files of every kind torch can save, and what is in them
weights_peer.py check DIR   loads out_bare.pt, out_model.pt and out.safetensors of each folder, strictly
"""

import json
import pathlib
import sys
from collections import OrderedDict

import torch
from ignite.engine import Engine
from monai.handlers import CheckpointLoader, CheckpointSaver
from monai.networks.nets import UNet
from safetensors.torch import load_file, save_file

NETS = [
    (norm, channels)
    for norm in ("batch", "instance")
    for channels in ([3, 5], [4, 6, 8], [8, 8, 8], [4, 6, 8, 12, 16])
]


def network(norm, channels):
    strides = [2] * (len(channels) - 1)
    return UNet(3, 1, 2, channels, strides, num_res_units=2, norm=norm)


def folder(root, norm, channels):
    return root / f"{norm}-{'-'.join(map(str, channels))}"


def drawn(net):
    """Random numbers in every entry, counters beyond 32 bits."""
    sd = net.state_dict()
    for value in sd.values():
        value.copy_(torch.randn(value.shape) if value.is_floating_point() else torch.tensor(-(2**40)))
    return sd


def one_storage(sd):
    """Every float a view into one block, as flattened optimizers leave them."""
    flat = torch.cat([v.reshape(-1) for v in sd.values() if v.is_floating_point()])
    out, at = OrderedDict(), 0
    for name, v in sd.items():
        if v.is_floating_point():
            out[name], at = flat[at : at + v.numel()].view(v.shape), at + v.numel()
        else:
            out[name] = v
    return out


def strided(sd):
    """Memory order reversed: no tensor is contiguous."""
    def back(v):
        return v.permute(tuple(reversed(range(v.dim()))))

    return OrderedDict((name, back(back(v).contiguous())) for name, v in sd.items())


def cast(sd, dtype):
    return OrderedDict((n, v.to(dtype) if v.is_floating_point() else v) for n, v in sd.items())


def make(root):
    for norm, channels in NETS:
        out = folder(root, norm, channels)
        out.mkdir()
        net = network(norm, channels)
        names = [[n, list(v.shape)] for n, v in net.state_dict().items()]
        (out / "names.json").write_text(json.dumps(names))

        def save(stem, obj, values, **how):
            torch.save(obj, out / f"{stem}.pt", **how)
            save_file({n: v.float() if v.is_floating_point() else v for n, v in values.items()}, out / f"{stem}.ref")

        adam = torch.optim.Adam(net.parameters())
        net(torch.randn(2, 1, 64, 64, 64)).sum().backward()
        adam.step()
        sd = drawn(net)
        save("bare", sd, sd)
        save("wrapped", {"model": sd, "optimizer": adam.state_dict(), "epoch": 3, "lr": 1e-4, "best": None}, sd)
        save("lightning", {"epoch": 1, "state_dict": sd, "hyper": {"names": ["a", "b"], "flag": True}}, sd)
        save("ddp", OrderedDict(("module." + n, v) for n, v in sd.items()), sd)
        save("compiled", {"model": OrderedDict(("_orig_mod.module." + n, v) for n, v in sd.items())}, sd)
        save("plain_dict", dict(sd), sd)
        save("parameters", {**sd, **dict(net.named_parameters())}, sd)
        save("one_storage", one_storage(sd), sd)
        save("strided", strided(sd), sd)
        save("legacy", sd, sd, _use_new_zipfile_serialization=False)
        save("legacy_one_storage", {"model": one_storage(sd)}, sd, _use_new_zipfile_serialization=False)
        save("protocol4", sd, sd, pickle_protocol=4)
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            low = cast(sd, dtype)
            save(str(dtype).removeprefix("torch."), low, low)
        torch.serialization.set_crc32_options(False)
        save("no_checksum", sd, sd)
        torch.serialization.set_crc32_options(True)

        saver = CheckpointSaver(str(out), {"model": net}, save_final=True, final_filename="bundle.pt")
        engine = Engine(lambda e, b: None)
        saver.attach(engine)
        engine.run([0], max_epochs=1)
        save_file(sd, out / "bundle.ref")
    torch.save(net, root / "whole.pt")
    torch.jit.script(net).save(root / "script.pt")


def check(root):
    for norm, channels in NETS:
        out = folder(root, norm, channels)
        want = torch.load(out / "bare.pt", weights_only=True)
        bare = torch.load(out / "out_bare.pt", weights_only=True)
        mapped = torch.load(out / "out_bare.pt", weights_only=True, mmap=True)
        wrapped = torch.load(out / "out_model.pt", weights_only=True)["model"]
        flat = load_file(out / "out.safetensors")
        assert list(bare) == list(wrapped) == list(want)
        for got in (bare, mapped, wrapped, flat):
            net = network(norm, channels)
            net.load_state_dict(got, strict=True)
            assert all(torch.equal(v, want[n]) and v.dtype == want[n].dtype for n, v in net.state_dict().items())
        for name in ("out_bare.pt", "out_model.pt"):
            net = network(norm, channels)
            engine = Engine(lambda e, b: None)
            CheckpointLoader(str(out / name), {"model": net}).attach(engine)
            engine.run([0], max_epochs=1)
            assert all(torch.equal(v, want[n]) for n, v in net.state_dict().items()), name


{"make": make, "check": check}[sys.argv[1]](pathlib.Path(sys.argv[2]))
