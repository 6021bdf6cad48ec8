//! Cost against the size of a patch, the number of channels and the batch: each varied by itself from one patch of the
//! bundle. Time a FLOP that rises along a row of sizes is work that grows faster than it should.

use super::{Bench, SIDE, config, network};
use crate::config::Net;
use crate::device::bf16::Operands;

/// Sides of a patch, 160 being the bundle's window of evaluation.
const SIDES: [usize; 7] = [32, 48, 64, 80, 96, 128, 160];
/// Patches of a batch.
const BATCHES: [usize; 4] = [1, 2, 4, 8];
/// Channels of the first level: half of the bundle's, the bundle's and double.
const CHANNELS: [usize; 3] = [8, 16, 32];
/// The bundle's.
const BASE_CHANNELS: usize = 16;

/// (patches, side, channels of the first level), each once, the base among them.
fn sizes() -> Vec<(usize, usize, usize)> {
    let sides = SIDES.iter().map(|&side| (1, side, BASE_CHANNELS));
    let batches = BATCHES.iter().filter(|&&n| n != 1).map(|&n| (n, SIDE, BASE_CHANNELS));
    let channels = CHANNELS.iter().filter(|&&c| c != BASE_CHANNELS).map(|&c| (1, SIDE, c));
    sides.chain(batches).chain(channels).collect()
}

/// The bundle's network with so many channels at the first level.
fn net(channels: usize) -> Net {
    let net = config().net;
    Net { channels: net.channels.iter().map(|c| c * channels / BASE_CHANNELS).collect(), ..net }
}

/// `scale_PASS_bBATCH_SIDE_cCHANNELS_DTYPE`.
pub fn benches() -> Vec<Bench> {
    let mut rows = Vec::new();
    for operands in [Operands::Single, Operands::Bf16] {
        for (pass, prepare) in [("forward", network::forward as network::Prepare), ("step", network::step)] {
            for (n, side, channels) in sizes() {
                let name = format!("scale_{pass}_b{n}_{side}_c{channels}_{}", super::dtype(operands));
                let row = Bench::new(name, move |_| prepare(&net(channels), n, side, operands));
                rows.push(Bench { by_name: true, ..row.in_dtype(operands) });
            }
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_is_there_once() {
        let mut names: Vec<String> = benches().into_iter().map(|row| row.name).collect();
        for name in ["scale_forward_b1_160_c16_f32", "scale_step_b8_96_c16_bf16", "scale_step_b1_96_c8_f32"] {
            assert!(names.iter().any(|n| n == name), "{name}");
        }
        let len = names.len();
        names.sort();
        names.dedup();
        assert_eq!((len, names.len()), (4 * (7 + 3 + 2), len));
        assert_eq!(net(BASE_CHANNELS), config().net);
    }
}
