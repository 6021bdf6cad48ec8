//! Sliding window: windows, importance maps and blending.
//!
//! The predictor is `f(p, n)[c] = p * (c + 1) + 0.25 * n` with the running window number n, so order, padding and
//! weights all show.

use std::cell::Cell;
use std::sync::Arc;

use spleen_hpc::Result;
use spleen_hpc::config::{Blend, Window};
use spleen_hpc::device::cuda::Cuda;
use spleen_hpc::infer::cuda::{DeviceNetwork, weighted_sums};
use spleen_hpc::infer::importance::importance_map;
use spleen_hpc::infer::sliding_window::{
    Windows, scan_interval, sliding_window, sliding_window_batch, window_starts,
};
use spleen_hpc::ops::window::cuda::Image;
use spleen_hpc::tensor::{Shape, View};

use crate::golden::{File, Golden};
use crate::hash::hash_tensor;
use crate::ledger::Ledger;
use crate::tensor::Tensor;
use crate::tolerance::{BLEND, EXACT, IMPORTANCE};
use crate::{Outcome, place, sw_net};

const CHANNELS: usize = 2;

/// Everything of `sw`.
pub fn run(golden: &Golden, ledger: &mut Ledger) -> Outcome<()> {
    ledger.each_file(golden, "sw", |file, ledger| {
        scan(file, ledger)?;
        importance(file, ledger)?;
        let cases: Vec<&str> = file.stems(".windows").filter(|case| case.starts_with("toy.")).collect();
        cases.into_iter().try_for_each(|case| toy(file, case, ledger))?;
        let cases: Vec<&str> = file.stems(".windows").filter(|case| case.starts_with("net.")).collect();
        cases.into_iter().try_for_each(|case| net(file, case, ledger))?;
        sw_net::run_net(golden, file, ledger)?;
        ledger.leave_out(file, "scan.cases", "given: lengths, windows and overlaps");
        toy_batch(file, ledger)
    });
    Ok(())
}

/// What a device computes: everything blended, with the full network too if `all`.
pub fn on_device(golden: &Golden, ledger: &mut Ledger, all: bool) -> Outcome<()> {
    ledger.each_file(golden, "sw", |file, ledger| {
        let cases: Vec<&str> = file.stems(".windows").filter(|case| case.starts_with("toy.")).collect();
        cases.into_iter().try_for_each(|case| toy(file, case, ledger))?;
        if all {
            sw_net::run_net(golden, file, ledger)?;
        }
        toy_batch(file, ledger)
    });
    Ok(())
}

/// `scan.starts`: the interval, then the starts, -1 where a row is longer than its starts.
fn scan(file: &File, ledger: &mut Ledger) -> Outcome<()> {
    let (Some(cases), Some(starts)) = (file.tensor("scan.cases"), file.tensor("scan.starts")) else {
        return Ok(());
    };
    let width = starts.shape[1];
    let mut got = Vec::new();
    for case in cases.to_usize().chunks_exact(3) {
        let (len, roi, overlap) = (case[0].max(case[1]), case[1], overlap_of_percent(case[2]));
        let mut row: Vec<i64> = vec![scan_interval(len, roi, overlap) as i64];
        row.extend(window_starts(len, roi, overlap).into_iter().map(|s| s as i64));
        if row.len() > width {
            return Err(format!(
                "{case:?} has {} windows, the golden row holds {}",
                row.len() - 1,
                width - 1
            )
            .into());
        }
        row.resize(width, -1);
        got.extend(row);
    }
    ledger.compare(file, "scan.starts", &Tensor::new(&starts.shape, &got), EXACT);
    Ok(())
}

/// Overlaps are eighths or whole percents, cut to whole percents: 62 is 0.625.
fn overlap_of_percent(percent: usize) -> f64 {
    let eighths = (0..8).map(|k| f64::from(k) / 8.0);
    eighths.into_iter().find(|x| (x * 100.0) as usize == percent).unwrap_or(percent as f64 / 100.0)
}

/// `importance.MODE_SIDES`, whole or by its centre line and diagonal.
fn importance(file: &File, ledger: &mut Ledger) -> Outcome<()> {
    let names: Vec<&str> = file.base_names().into_iter().filter(|n| n.starts_with("importance.")).collect();
    for name in names {
        let mut parts = name["importance.".len()..].splitn(3, '_');
        let blend = blend(parts.next().unwrap_or_default())?;
        let sides = triple(parts.next().unwrap_or_default())?;
        let map = importance_map(sides, blend);
        let at = |d: usize, h: usize, w: usize| map[(d * sides[1] + h) * sides[2] + w];
        let got = match parts.next() {
            None => Tensor::new(&sides, &map),
            Some("centre_line") => {
                let line: Vec<f32> = (0..sides[2]).map(|i| at(sides[0] / 2, sides[1] / 2, i)).collect();
                Tensor::new(&[line.len()], &line)
            }
            Some("diag") => {
                let line: Vec<f32> = (0..sides[0]).map(|i| at(i, i, i)).collect();
                Tensor::new(&[line.len()], &line)
            }
            Some(part) => return Err(format!("{name}: `{part}` is no known part of a map").into()),
        };
        ledger.compare(file, name, &got, IMPORTANCE);
    }
    Ok(())
}

/// `toy.SHAPE_roiSIDES_ovOVERLAP_MODE`: windows, interval and the blended output.
fn toy(file: &File, case: &str, ledger: &mut Ledger) -> Outcome<()> {
    let (name, rest) = case["toy.".len()..].split_once('_').ok_or("no shape in the name")?;
    let (shape, config) = (triple(name)?, parse(rest)?);
    geometry(file, case, shape, &config, ledger);
    let volume = hash_tensor(&format!("swvol{name}"), &shape, file.seed()?, 1.0, 0.0).to_f32();
    let each = config.roi.iter().product();
    let out = match place::current() {
        None => {
            sliding_window(&volume, shape, &config, CHANNELS, &mut |x, _, first| Ok(predict(x, each, first)))?
                .to_vec()
        }
        Some(cuda) => blended_on_device(&cuda, &toy_on_device(&Cell::new(0)), &volume, shape, &config)?,
    };
    ledger.compare(file, &format!("{case}.out"), &channels_first(&[out], shape), BLEND);
    Ok(())
}

/// Blended logits (D, H, W, C) by the kernels: their weighted sums over those of a network that says 1.
pub fn blended_on_device(
    cuda: &Arc<Cuda>,
    network: &DeviceNetwork,
    volume: &[f32],
    shape: [usize; 3],
    window: &Window,
) -> Outcome<Vec<f32>> {
    let data = cuda.act(volume.len())?;
    data.upload(volume)?;
    let image = Image { data, whole: shape, start: [0; 3], shape };
    let ones = |x: &View| on_host(x, |x| vec![1.0; x.len() * CHANNELS]);
    let sums = |network: &DeviceNetwork| weighted_sums(cuda, network, &image, window)?.1.download();
    let (sums, weights) = (sums(network)?, sums(&ones)?);
    Ok(sums.iter().zip(weights).take(volume.len() * CHANNELS).map(|(sum, weight)| sum / weight).collect())
}

/// [`predict`] of windows on a device, counted in `windows`.
fn toy_on_device(windows: &Cell<usize>) -> impl Fn(&View) -> Result<View> {
    move |x| {
        let first = windows.replace(windows.get() + x.shape.n);
        on_host(x, |values| predict(values, x.shape.voxels(), first))
    }
}

/// Windows (n, roi, 1) to logits (n, roi, C) by a function on the host.
fn on_host(x: &View, logits: impl FnOnce(&[f32]) -> Vec<f32>) -> Result<View> {
    let shape = Shape { c: CHANNELS, ..x.shape };
    let data = x.data.cuda().act(shape.len())?;
    data.upload(&logits(&x.data.download()?))?;
    Ok(View::plain(data, shape))
}

/// `net.roiSIDES_ovOVERLAP_MODE`: windows and interval on the grid of `net.input`.
fn net(file: &File, case: &str, ledger: &mut Ledger) -> Outcome<()> {
    let input = file.need("net.input")?;
    let [1, 1, d, h, w] = input.shape[..] else { return Err("net.input is not one volume".into()) };
    geometry(file, case, [d, h, w], &parse(&case["net.".len()..])?, ledger);
    Ok(())
}

/// `CASE.windows` and `CASE.interval`.
fn geometry(file: &File, case: &str, shape: [usize; 3], config: &Window, ledger: &mut Ledger) {
    let windows = Windows::new(shape, config);
    // The golden counts from the corner of the padded volume.
    let front: [usize; 3] = std::array::from_fn(|i| config.roi[i].saturating_sub(shape[i]) / 2);
    let starts: Vec<i64> =
        windows.corners().iter().flat_map(|c| (0..3).map(move |i| c[i] as i64 + front[i] as i64)).collect();
    ledger.compare(file, &format!("{case}.windows"), &Tensor::new(&[starts.len() / 3, 3], &starts), EXACT);
    let interval: [usize; 3] =
        std::array::from_fn(|i| scan_interval(shape[i].max(config.roi[i]), config.roi[i], config.overlap));
    ledger.compare(file, &format!("{case}.interval"), &Tensor::ints(&[3], &interval), EXACT);
}

/// `roiSIDES_ovOVERLAP_MODE`.
pub fn parse(text: &str) -> Outcome<Window> {
    let unknown = || format!("`{text}` is not roiSIDES_ovOVERLAP_MODE");
    let parts: Vec<&str> = text.split('_').collect();
    let [roi, overlap, mode] = parts[..] else { return Err(unknown().into()) };
    Ok(Window {
        roi: triple(roi.strip_prefix("roi").ok_or_else(unknown)?)?,
        overlap: overlap.strip_prefix("ov").ok_or_else(unknown)?.parse()?,
        // Any batch gives the same windows in the same order.
        batch: 4,
        blend: blend(mode)?,
    })
}

/// `toy.batch2`: windows count on from one image to the next, and a batch spans both.
fn toy_batch(file: &File, ledger: &mut Ledger) -> Outcome<()> {
    let inputs = file.params["hash_inputs"].as_array().into_iter().flatten();
    let Some(shape) = inputs.into_iter().find(|i| i["name"] == "swbatch").map(|i| &i["shape"]) else {
        return Ok(());
    };
    let shape: Vec<usize> = serde_json::from_value(shape.clone())?;
    let [n, 1, d, h, w] = shape[..] else { return Err(format!("swbatch has shape {shape:?}").into()) };
    let volume = hash_tensor("swbatch", &shape, file.seed()?, 1.0, 0.0).to_f32();
    let config = Window { roi: [16; 3], overlap: 0.5, batch: 5, blend: Blend::Gaussian };
    let volumes: Vec<&[f32]> = volume.chunks_exact(volume.len() / n).collect();
    let each = config.roi.iter().product();
    let out: Vec<Vec<f32>> = match place::current() {
        None => sliding_window_batch(&volumes, [d, h, w], &config, CHANNELS, &mut |x, _, first| {
            Ok(predict(x, each, first))
        })?
        .iter()
        .map(|volume| volume.to_vec())
        .collect(),
        Some(cuda) => {
            // The kernels take one volume at a time; only the count goes on from one to the next.
            let count = Cell::new(0);
            let network = toy_on_device(&count);
            let blend = |volume: &&[f32]| blended_on_device(&cuda, &network, volume, [d, h, w], &config);
            volumes.iter().map(blend).collect::<Outcome<_>>()?
        }
    };
    ledger.compare(file, "toy.batch2", &channels_first(&out, [d, h, w]), BLEND);
    Ok(())
}

/// The toy network on windows of `each` voxels, the first of which has number `first`.
fn predict(windows: &[f32], each: usize, first: usize) -> Vec<f32> {
    let numbered = windows.chunks_exact(each).zip(first..);
    numbered
        .flat_map(|(window, n)| {
            window.iter().flat_map(move |v| [v + 0.25 * n as f32, v * 2.0 + 0.25 * n as f32])
        })
        .collect()
}

/// (D,H,W,C) a volume to torch's (N,C,D,H,W).
fn channels_first(volumes: &[Vec<f32>], [d, h, w]: [usize; 3]) -> Tensor {
    let planes = volumes
        .iter()
        .flat_map(|volume| (0..CHANNELS).flat_map(move |c| volume.iter().skip(c).step_by(CHANNELS).copied()));
    Tensor::new(&[volumes.len(), CHANNELS, d, h, w], &planes.collect::<Vec<f32>>())
}

fn blend(name: &str) -> Outcome<Blend> {
    match name {
        "constant" => Ok(Blend::Constant),
        "gaussian" => Ok(Blend::Gaussian),
        _ => Err(format!("`{name}` is no blend").into()),
    }
}

/// `24x32x16`, or `96` for a cube.
fn triple(text: &str) -> Outcome<[usize; 3]> {
    let sides = text.split('x').map(str::parse).collect::<Result<Vec<usize>, _>>()?;
    match sides[..] {
        [a] => Ok([a; 3]),
        [a, b, c] => Ok([a, b, c]),
        _ => Err(format!("`{text}` is no shape").into()),
    }
}
