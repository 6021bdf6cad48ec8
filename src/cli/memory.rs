//! Refuses sizes that cannot fit this machine before the work begins: the system would end the process without a word.
//!
//! What is counted is a lower bound: images, logits and what each level must keep.

use std::fs::read_to_string;

use crate::config::Config;
use crate::infer::predict::CLASSES;
use crate::nn::state_dict::names;
use crate::{Error, Result};

/// Bytes of an f32.
const F32: f64 = 4.0;

/// Whether one window fits; how many of a batch there are depends on the scan.
pub fn check_window(config: &Config) -> Result<()> {
    let top = config.net.channels[0] as f64 / 8.0;
    let bytes = voxels(config.window.roi) * F32 * ((1 + CLASSES) as f64 + top);
    check(bytes, total(), || format!("--roi {:?}", config.window.roi), "--roi")
}

/// Whether a training step on patches of at most `cases` volumes fits, with gradients and two moments a parameter.
pub fn check_step(config: &Config, cases: usize) -> Result<()> {
    let s = &config.sampling;
    let patches = s.samples_per_volume as f64 * s.volumes_per_step.min(cases) as f64;
    // Level l has 1 / 8^(l+1) of the voxels, and the tape keeps its three raw convolutions.
    let levels = config.net.channels.iter().zip(1..).map(|(&c, l)| 3.0 * c as f64 / 8f64.powi(l));
    let voxel = F32 * ((1 + CLASSES) as f64 + levels.sum::<f64>()) + 1.0;
    let arrays = names(&config.net).into_iter();
    let parameters: f64 = arrays.map(|(_, shape)| shape.iter().map(|&n| n as f64).product::<f64>()).sum();
    let bytes = voxels(s.patch) * patches * voxel + 4.0 * F32 * parameters;
    let what = || format!("a step on {patches} patches of {:?} voxels", s.patch);
    check(bytes, total(), what, "--patch, --samples-per-volume, --volumes-per-step or --channels")
}

fn voxels(sides: [usize; 3]) -> f64 {
    sides.map(|n| n as f64).iter().product()
}

fn check(bytes: f64, total: Option<f64>, what: impl Fn() -> String, lower: &str) -> Result<()> {
    match total {
        Some(total) if bytes > total => Err(Error::Usage(format!(
            "{} needs over {:.1} GiB and this machine has {:.1} GiB of memory: lower {lower}",
            what(),
            gib(bytes),
            gib(total)
        ))),
        _ => Ok(()),
    }
}

fn gib(bytes: f64) -> f64 {
    bytes / f64::from(1 << 30)
}

/// Bytes of memory that this process may use at most; `None` where the system does not tell as Linux does.
fn total() -> Option<f64> {
    let machine = read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
        Some(1024.0 * line.split_whitespace().nth(1)?.parse::<f64>().ok()?)
    })?;
    // Says "max" where there is no limit.
    let group = read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse().ok());
    Some(group.map_or(machine, |group: f64| machine.min(group)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Recipe;

    /// The bundle's own numbers fit 4 GiB; the bound grows with the patches and is compared with what there is.
    #[test]
    fn the_bundle_fits_a_laptop_and_giants_do_not() {
        let mut config = Config::for_recipe(Recipe::Seed);
        let laptop = Some(4.0 * f64::from(1 << 30));
        assert!(check_window(&config).is_ok() && check_step(&config, 32).is_ok());
        config.window.roi = [1 << 20; 3];
        config.sampling.samples_per_volume = usize::MAX;
        if total().is_some() {
            let error = check_window(&config).unwrap_err().to_string();
            assert!(error.starts_with("--roi [1048576, 1048576, 1048576] needs over "), "{error}");
            assert!(check_step(&config, 32).is_err());
        }
        let what = || "it".to_owned();
        assert!(
            check(f64::from(1 << 30), laptop, what, "it").is_ok() && check(1e30, None, what, "it").is_ok()
        );
        let error = check(8.0 * f64::from(1 << 30), laptop, what, "--x").unwrap_err().to_string();
        assert_eq!(error, "it needs over 8.0 GiB and this machine has 4.0 GiB of memory: lower --x");
    }
}
