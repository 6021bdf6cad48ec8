"""MONAI's side of one row: does the row's work several times in this process and prints one JSON object.

    python monai_side.py ROW --inputs DIR --threads N [--runs N]

DIR holds ct.nii.gz, label.nii.gz (as `spleen-hpc bench --inputs DIR` makes them) and network.pt (as `spleen-hpc export`
makes it of network.safetensors). Needs torch, monai and nibabel. Transforms, network and inferer are the ones of the
spleen_ct_segmentation bundle's inference.json. (Called monai.py, this file would hide the package.)
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import monai.transforms as mt
import torch
from monai.inferers import sliding_window_inference
from monai.networks.nets import UNet

SIDE = 96
VOLUME = (256, 256, 128)
SURE, STRAY = 4.0, 20011  # the logits of `spleen-hpc bench`


def network(args):
    net = UNet(3, 1, 2, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2, norm="batch")
    net.load_state_dict(torch.load(args.inputs / "network.pt", map_location="cpu"))
    return net.eval()


def preprocessing(keys=("image",)):
    return mt.Compose([
        mt.LoadImaged(keys),
        mt.EnsureChannelFirstd(keys),
        mt.Orientationd(keys, axcodes="RAS"),
        mt.Spacingd(keys, pixdim=(1.5, 1.5, 2.0), mode=("bilinear", "nearest")[: len(keys)]),
        mt.ScaleIntensityRanged("image", a_min=-57, a_max=164, b_min=0, b_max=1, clip=True),
        mt.EnsureTyped(keys),
    ])


def postprocessing(before, folder, plain_argmax=False):
    """softmax, back to the scan's grid, argmax, .nii.gz"""
    if plain_argmax:
        argmax = mt.Lambdad("pred", lambda x: torch.argmax(x, 0, keepdim=True))
    else:
        argmax = mt.AsDiscreted("pred", argmax=True)
    return mt.Compose([
        mt.Activationsd("pred", softmax=True),
        mt.Invertd("pred", before, orig_keys="image", nearest_interp=False, to_tensor=True),
        argmax,
        mt.SaveImaged("pred", output_dir=folder, output_ext=".nii.gz", output_dtype="float32", output_postfix="trans",
                      separate_folder=True, resample=False, print_log=False),
    ])


def bf16(on):
    return torch.autocast("cpu", torch.bfloat16, enabled=on)


def windows(net, x):
    return sliding_window_inference(x, (SIDE,) * 3, 4, net, overlap=0.5)


def sliding_window(args, low):
    net, x = network(args), torch.rand(1, 1, *VOLUME)

    def work():
        with torch.no_grad(), bf16(low):
            windows(net, x)
    return work


def preprocess(args):
    transform = preprocessing()
    return lambda: transform({"image": args.inputs / "ct.nii.gz"})


def postprocess(args, plain_argmax):
    before = preprocessing(("image", "label"))
    case = before({"image": args.inputs / "ct.nii.gz", "label": args.inputs / "label.nii.gz"})
    label = case.pop("label").as_tensor().clone()
    label.view(-1)[::STRAY] = 1
    spleen = label * 2 - 1
    logits = SURE * torch.cat([-spleen, spleen])
    transform = postprocessing(before, args.folder, plain_argmax)
    return lambda: transform({**case, "pred": logits})


def infer(args, low):
    net, before = network(args), preprocessing()
    after = postprocessing(before, args.folder)

    def work():
        case = before({"image": args.inputs / "ct.nii.gz"})
        with torch.no_grad(), bf16(low):
            case["pred"] = windows(net, case["image"][None])[0].float()
        after(case)
    return work


def first_window(args):
    def work():
        with torch.no_grad():
            network(args)(torch.full((1, 1, SIDE, SIDE, SIDE), 0.5))
    return work


ROWS = {
    "sliding_window_256x256x128_f32": lambda args: sliding_window(args, False),
    "sliding_window_256x256x128_bf16": lambda args: sliding_window(args, True),
    "preprocess_512x512x90": preprocess,
    "postprocess_512x512x90": lambda args: postprocess(args, False),
    "postprocess_512x512x90_torch_argmax": lambda args: postprocess(args, True),
    "infer_512x512x90_f32": lambda args: infer(args, False),
    "infer_512x512x90_bf16": lambda args: infer(args, True),
    "start_to_first_window": first_window,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3, help="timed runs, after one that is not timed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        args.folder = folder
        work = ROWS[args.row](args)
        # Of a start only the process is timed, by whoever started it: no run before.
        timed = 0 if args.row == "start_to_first_window" else args.runs
        for _ in range(timed + 1):
            begin = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds[1:] or seconds, "peak_rss_mib": peak}), flush=True)


if __name__ == "__main__":
    main()
