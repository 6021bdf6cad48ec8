//! Weight files against torch's own: the golden `.pt` files and their digests, round trips, sentences.

use std::io::Read;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use spleen_hpc::config::{Net, Norm};
use spleen_hpc::nn::checkpoint::{self, CheckpointMeta, EpochRecord, Moments, Split};
use spleen_hpc::nn::pt_write::{Wrap, write_pt};
use spleen_hpc::nn::state_dict::{Array, ArrayData, StateDict, infer_net, names};
use spleen_hpc::nn::weights::{self, Metadata};

/// The golden folder, or one line that says why the test did nothing.
fn golden() -> Option<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/golden");
    if !dir.is_dir() {
        println!("skipped: {} is not there", dir.display());
        return None;
    }
    Some(dir)
}

/// The weights of a golden file, gunzipped if need be.
fn read(path: &Path) -> StateDict {
    let mut bytes = std::fs::read(path).unwrap();
    if path.extension().is_some_and(|e| e == "gz") {
        let packed = std::mem::take(&mut bytes);
        flate2::read::GzDecoder::new(packed.as_slice()).read_to_end(&mut bytes).unwrap();
    }
    weights::from_bytes(path, &bytes).unwrap()
}

/// `hash_uniform` of the goldens' MANIFEST: SplitMix64 seeded by the FNV-1a hash of a name.
fn hash_uniform(name: &str, n: usize, seed: u64) -> impl Iterator<Item = f64> {
    const GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;
    let fnv =
        name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    let start = fnv ^ seed.wrapping_mul(GAMMA);
    (1..=n as u64).map(move |i| {
        let mut z = start.wrapping_add(i.wrapping_mul(GAMMA));
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        (z >> 11) as f64 / (1u64 << 53) as f64 * 2.0 - 1.0
    })
}

/// MANIFEST's digest: numel, sum, sum|x|, sum x^2, min, max, <x, probe1>, <x, probe2>.
fn digest(x: &[f32]) -> [f64; 8] {
    let wide = || x.iter().map(|&v| f64::from(v));
    let dot = |probe| wide().zip(hash_uniform(probe, x.len(), 0)).map(|(a, b)| a * b).sum();
    [
        x.len() as f64,
        wide().sum(),
        wide().map(f64::abs).sum(),
        wide().map(|v| v * v).sum(),
        wide().fold(f64::INFINITY, f64::min),
        wide().fold(f64::NEG_INFINITY, f64::max),
        dot("probe1"),
        dot("probe2"),
    ]
}

fn same(a: &StateDict, b: &StateDict) -> bool {
    a.iter().eq(b.iter())
}

fn small(norm: Norm) -> Net {
    Net { norm, channels: vec![4, 6, 8, 12, 16] }
}

/// Any numbers in a network's names.
fn filled(net: &Net) -> StateDict {
    let mut dict = StateDict::new("filled");
    for (name, shape) in names(net) {
        let n = shape.iter().product();
        let array = if name.ends_with("num_batches_tracked") {
            Array::i64(shape, vec![-7; n])
        } else {
            Array::f32(shape, hash_uniform(&name, n, 1).map(|v| v as f32).collect::<Vec<_>>())
        };
        dict.insert(name, array).unwrap();
    }
    dict
}

const FILES: [(&str, &str, Norm); 4] = [
    ("torch_seed_full_ignite.pt.gz", "torch_seed_full_ignite", Norm::Batch),
    ("torch_seed_small.pt", "torch_seed_small", Norm::Batch),
    ("torch_seed_small_instance_ignite.pt", "torch_seed_small_instance_ignite", Norm::Instance),
    ("torch_seed_small_legacy.pt", "legacy", Norm::Batch),
];

/// Names, order, shapes and numbers of torch's files. Sums run over float64 in another order than numpy's: 1e-12 of
/// the sum of magnitudes; number, minimum, maximum and samples are exact.
#[test]
fn golden_files_have_their_digests() {
    let Some(dir) = golden() else { return };
    let bytes = std::fs::read(dir.join("weights.safetensors")).unwrap();
    let oracle = SafeTensors::deserialize(&bytes).unwrap();
    for (file, stem, norm) in FILES {
        let dict = read(&dir.join("pt").join(file));
        let net = infer_net(&dict).unwrap();
        let channels: &[usize] =
            if stem.contains("full") { &[16, 32, 64, 128, 256] } else { &[4, 6, 8, 12, 16] };
        assert_eq!((net.norm, net.channels.as_slice()), (norm, channels));
        let found: Vec<_> = dict.iter().map(|(name, array)| (name.to_owned(), array.shape.clone())).collect();
        assert_eq!(found, names(&net), "{file}: the order is torch's");

        let mut compared = 0;
        for (name, array) in dict.iter() {
            let x = match &array.data {
                ArrayData::F32(x) => x,
                ArrayData::I64(v) => {
                    assert!(matches!(v.as_slice(), [0 | 1]), "{file}: {name}: {v:?} steps");
                    continue;
                }
            };
            let view = |suffix| oracle.tensor(&format!("{stem}.sd.{name}#{suffix}")).unwrap();
            let want: Vec<f64> =
                view("digest").data().as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect();
            let got = digest(x);
            for i in 0..8 {
                let tolerance = if matches!(i, 0 | 4 | 5) { 0.0 } else { 1e-12 * want[2].max(want[3]) };
                assert!((got[i] - want[i]).abs() <= tolerance, "{file}: {name}: {got:?} is not {want:?}");
            }
            let samples: Vec<f32> =
                view("samples").data().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
            let k = samples.len();
            assert!((0..k).all(|i| x[i * x.len() / k] == samples[i]), "{file}: {name}: samples");
            compared += 1;
        }
        let prefix = format!("{stem}.sd.");
        let given =
            oracle.names().iter().filter(|n| n.starts_with(&prefix) && n.ends_with("#digest")).count();
        assert_eq!(compared, given, "{file}");
    }
}

/// The goldens' parameters (97 of batch norm, 63 of instance norm) are those of [`names`], with their sizes.
#[test]
fn names_are_those_of_the_golden_networks() {
    let Some(dir) = golden() else { return };
    for (size, channels) in [("small", [4, 6, 8, 12, 16]), ("full", [16, 32, 64, 128, 256])] {
        for (label, norm) in [("batch", Norm::Batch), ("instance", Norm::Instance)] {
            let bytes = std::fs::read(dir.join(format!("unet_{size}_{label}.safetensors"))).unwrap();
            let oracle = SafeTensors::deserialize(&bytes).unwrap();
            let parameters: Vec<_> = names(&Net { norm, channels: channels.to_vec() })
                .into_iter()
                .filter(|(name, _)| !name.contains("running_") && !name.contains("num_batches"))
                .collect();
            let given =
                oracle.names().iter().filter(|n| n.starts_with("init.") && n.ends_with("#digest")).count();
            assert_eq!(given, parameters.len());
            for (name, shape) in parameters {
                let view = oracle.tensor(&format!("init.{name}#digest")).unwrap();
                let numel = f64::from_le_bytes(view.data()[..8].try_into().unwrap());
                assert_eq!(numel, shape.iter().product::<usize>() as f64, "{name}");
                if let Ok(whole) = oracle.tensor(&format!("init.{name}")) {
                    assert_eq!(whole.shape(), shape, "{name}");
                }
            }
        }
    }
}

/// Every golden file, written in every format, comes back as it was, and the bytes do not depend on the run.
#[test]
fn round_trips() {
    let Some(dir) = golden() else { return };
    let tmp = tempfile::tempdir().unwrap();
    let metadata = Metadata::from([("recipe".into(), "seed".into()), ("commit".into(), "é\"\\".into())]);
    let more = ["torch_seed_small_half.pt", "../convergence/novograd2e-3_b059_model.pt"];
    for file in FILES.map(|(file, ..)| file).into_iter().chain(more) {
        let dict = read(&dir.join("pt").join(file));
        infer_net(&dict).unwrap();
        for wrap in [Wrap::Bare, Wrap::Model] {
            let (a, b) = (tmp.path().join("a.pt"), tmp.path().join("b.bin"));
            write_pt(&a, &dict, wrap).unwrap();
            write_pt(&b, &dict, wrap).unwrap();
            assert!(same(&weights::read_any(&a).unwrap(), &dict), "{file} {wrap:?}");
            assert!(
                std::fs::read(&a).unwrap() == std::fs::read(&b).unwrap(),
                "{file}: bytes depend on the name"
            );
        }
        let path = tmp.path().join("a.safetensors");
        weights::write_safetensors(&path, &dict, &metadata).unwrap();
        let (back, said) = weights::read_safetensors(&path).unwrap();
        assert!(same(&back, &dict) && said == metadata, "{file}");
        assert!(same(&weights::read_any(&path).unwrap(), &dict), "{file}");
    }
}

/// A pipe has no length and is read once: weights and what the file says about itself come out of one reading.
#[cfg(unix)]
#[test]
fn weights_and_metadata_come_through_a_pipe() {
    let tmp = tempfile::tempdir().unwrap();
    let (path, pipe) = (tmp.path().join("a.safetensors"), tmp.path().join("pipe"));
    let dict = filled(&small(Norm::Batch));
    let metadata = Metadata::from([("config".into(), "{}".into())]);
    weights::write_safetensors(&path, &dict, &metadata).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let (bytes, to) = (std::fs::read(&path).unwrap(), pipe.clone());
    let writer = std::thread::spawn(move || std::fs::write(to, bytes).unwrap());
    for (what, path) in [("pipe", &pipe), ("file", &path)] {
        let (back, said) = weights::read_with_metadata(path).unwrap();
        assert!(same(&back, &dict) && said == metadata, "{what}");
    }
    writer.join().unwrap();
}

/// torch maps storages, so each entry's content begins at a multiple of 64.
#[test]
fn pt_entries_are_aligned_and_stored() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("a.pt");
    write_pt(&path, &filled(&small(Norm::Batch)), Wrap::Bare).unwrap();
    let mut zip = zip::ZipArchive::new(std::fs::File::open(&path).unwrap()).unwrap();
    assert_eq!(zip.len(), 148 + 5);
    for i in 0..zip.len() {
        let entry = zip.by_index_raw(i).unwrap();
        assert_eq!(entry.data_start().unwrap() % 64, 0);
        assert_eq!(entry.compression(), zip::CompressionMethod::Stored);
    }
}

/// Any number of levels; an identity residual (equal widths at the bottom) has no entries.
#[test]
fn infer_net_knows_what_names_made() {
    for norm in [Norm::Batch, Norm::Instance] {
        for channels in [&[3, 5][..], &[4, 6, 8], &[8, 8, 8], &[4, 6, 8, 12, 16], &[2, 3, 4, 5, 6, 7, 8]] {
            let net = Net { norm, channels: channels.to_vec() };
            assert_eq!(infer_net(&filled(&net)).unwrap(), net);
        }
    }
}

#[test]
fn sentences_say_which_network_the_file_holds() {
    let said = |e: spleen_hpc::Error| {
        assert_eq!(e.exit_code(), 2);
        e.to_string()
    };
    let instance = filled(&small(Norm::Instance));
    let message = said(instance.check(&small(Norm::Batch)).unwrap_err());
    assert_eq!(message, "filled: these are instance-norm weights: pass --norm instance");
    let message = said(filled(&small(Norm::Batch)).check(&small(Norm::Instance)).unwrap_err());
    assert!(message.contains("pass --norm batch"), "{message}");
    let other = Net { norm: Norm::Instance, channels: vec![4, 6, 8] };
    let message = said(instance.check(&other).unwrap_err());
    assert!(message.contains("[4, 6, 8, 12, 16]") && message.contains("[4, 6, 8]"), "{message}");

    type Edit<'a> = &'a dyn Fn(&str, &Array) -> Option<(String, Array)>;
    let change = |edit: Edit| {
        let mut dict = StateDict::new("file");
        for (name, array) in instance.iter().filter_map(|(name, array)| edit(name, array)) {
            dict.insert(name, array).unwrap();
        }
        said(infer_net(&dict).unwrap_err())
    };
    let keep = |name: &str, array: &Array| Some((name.to_owned(), array.clone()));
    let message = change(&|name, a| if name == "model.2.0.conv.bias" { None } else { keep(name, a) });
    assert!(
        message.contains("model.2.0.conv.bias is missing") && message.contains("instance norm"),
        "{message}"
    );
    let message = change(&|name, a| keep(&name.replace("model.2.", "model.9."), a));
    assert!(message.contains("model.2.0.conv.weight is missing"), "{message}");
    let message = change(&|name, a| keep(&name.replace("model.", "net."), a));
    assert!(
        message.contains("no MONAI UNet") && message.contains("net.0.conv.unit0.conv.weight"),
        "{message}"
    );
    // A PReLU with a slope a channel, a counter of floats, a third residual unit.
    let message = change(&|name, a| match name {
        "model.2.0.adn.A.weight" => Some((name.into(), Array::f32(vec![2], vec![0.25; 2]))),
        _ => keep(name, a),
    });
    assert!(message.contains("model.2.0.adn.A.weight is [2] where the network needs [1]"), "{message}");
    let message = change(&|name, a| match name {
        "model.2.0.adn.A.weight" => Some((name.into(), Array::i64(vec![1], vec![1]))),
        _ => keep(name, a),
    });
    assert!(message.contains("holds I64 where the network needs F32"), "{message}");
    let mut more = filled(&small(Norm::Instance));
    more.insert("model.0.conv.unit2.conv.bias", Array::f32(vec![4], vec![0.0; 4])).unwrap();
    let message = said(infer_net(&more).unwrap_err());
    assert!(message.contains("model.0.conv.unit2.conv.bias is not part"), "{message}");
    let twice = more.insert("model.2.0.conv.bias", Array::f32(vec![], vec![0.0]));
    assert!(said(twice.unwrap_err()).contains("occurs twice"));
}

#[test]
fn foreign_files_are_named_for_what_they_are() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("x.pt");
    for (bytes, want) in [
        (&b""[..], "empty"),
        (b"\x1f\x8b\x08rest", "gunzip"),
        (b"\x80\x04\x95rest", "not written by torch.save"),
        (b"{\"not\": \"weights\"}", "no weight file"),
        (b"\x08\0\0\0\0\0\0\0{garbage", "no safetensors file"),
        (b"PK\x03\x04rest", "zip archive is damaged"),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let message = weights::read_any(&path).unwrap_err().to_string();
        assert!(message.contains(want) && message.contains("x.pt"), "{message}");
    }
    let message = weights::read_any(&tmp.path().join("none")).unwrap_err().to_string();
    assert!(message.contains("none: cannot read"), "{message}");
}

fn sample_checkpoint() -> (StateDict, Moments, CheckpointMeta) {
    let weights = filled(&Net { norm: Norm::Batch, channels: vec![2, 3] });
    let floats = weights.iter().filter_map(|(name, array)| match &array.data {
        ArrayData::F32(v) => Some((name.to_owned(), v.iter().map(|x| x * 0.1).collect::<Vec<f32>>())),
        ArrayData::I64(_) => None,
    });
    let exp_avg: Vec<_> = floats.collect();
    // Novograd: one second moment a tensor.
    let exp_avg_sq = exp_avg.iter().map(|(name, v)| (name.clone(), vec![v[0] * v[0]])).collect();
    let meta = CheckpointMeta {
        step: 1 << 40,
        epoch: 3,
        best_dice: Some(0.1 + 0.2),
        best_epoch: None,
        config: serde_json::json!({"lr": 2e-3, "patch": [96, 96, 96]}),
        split: Split { train: vec!["spleen_2".into(), "spleen \"3\"".into()], val: vec![] },
        commit: "abc".into(),
        history: vec![EpochRecord { epoch: 1, loss: 1.0 / 3.0, dice: None }],
        epoch_losses: vec![0.25, 1.0 / 3.0],
        scaler: None,
    };
    (weights, Moments { exp_avg, exp_avg_sq }, meta)
}

#[test]
fn checkpoints_come_back_bit_for_bit() {
    let tmp = tempfile::tempdir().unwrap();
    let (weights, moments, meta) = sample_checkpoint();
    let (a, b) = (tmp.path().join("a.ckpt"), tmp.path().join("b.ckpt"));
    checkpoint::save(&a, &weights, &moments, &meta).unwrap();
    let back = checkpoint::load(&a).unwrap();
    assert!(same(&back.weights, &weights));
    assert_eq!(back.moments, moments);
    assert_eq!(back.meta, meta);
    checkpoint::save(&b, &back.weights, &back.moments, &back.meta).unwrap();
    assert!(std::fs::read(&a).unwrap() == std::fs::read(&b).unwrap());
    // The same file serves as weights, and nothing but the two files is left in the folder.
    assert!(same(&weights::read_any(&a).unwrap(), &weights));
    assert_eq!(std::fs::read_dir(tmp.path()).unwrap().count(), 2);
}

/// Cut anywhere, or any one bit turned: recognised.
#[test]
fn damaged_checkpoints_are_refused() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("a.ckpt");
    let (weights, moments, meta) = sample_checkpoint();
    checkpoint::save(&path, &weights, &moments, &meta).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    for n in (0..bytes.len()).step_by(97) {
        std::fs::write(&path, &bytes[..n]).unwrap();
        assert!(checkpoint::load(&path).is_err(), "cut at {n}");
        let mut turned = bytes.clone();
        turned[n] ^= 1 << (n % 8);
        std::fs::write(&path, &turned).unwrap();
        assert!(checkpoint::load(&path).is_err(), "bit turned at {n}");
    }
    write_pt(&path, &weights, Wrap::Bare).unwrap();
    assert!(checkpoint::load(&path).is_err());
    weights::write_safetensors(&path, &weights, &Metadata::new()).unwrap();
    let message = checkpoint::load(&path).unwrap_err().to_string();
    assert!(message.contains("holds weights only"), "{message}");
}
