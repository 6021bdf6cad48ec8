//! Weight files that want harm: code in pickles, impossible sizes, cut and random bytes. Each is a sentence, never a
//! panic, and never more memory than the file's size warrants.

use std::io::{Cursor, Write};
use std::path::Path;

use spleen_hpc::config::{Net, Norm};
use spleen_hpc::nn::pickle;
use spleen_hpc::nn::pt_write::{Wrap, write_pt};
use spleen_hpc::nn::state_dict::{Array, ArrayData, StateDict, infer_net, names};
use spleen_hpc::nn::weights::{Metadata, from_bytes, write_safetensors};
use spleen_hpc::rng::Philox;

/// An archive as torch writes it, around any pickle and storages.
fn archive(pickle: &[u8], more: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, content) in [("data.pkl", pickle)].iter().chain(more) {
        zip.start_file(format!("net/{name}"), stored).unwrap();
        zip.write_all(content).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fn int(v: i64) -> Vec<u8> {
    [b"\x8a\x08".as_slice(), &v.to_le_bytes()].concat()
}

fn text(s: &str) -> Vec<u8> {
    [b"X".as_slice(), &(s.len() as u32).to_le_bytes(), s.as_bytes()].concat()
}

fn tuple(items: &[i64]) -> Vec<u8> {
    [b"(".to_vec(), items.iter().flat_map(|&v| int(v)).collect(), b"t".to_vec()].concat()
}

/// A tensor of storage `key`, as torch pickles it.
fn tensor(class: &str, key: &str, numel: i64, offset: i64, size: &[i64], stride: &[i64]) -> Vec<u8> {
    let global = format!("ctorch\n{class}\n").into_bytes();
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec(),
        text("storage"),
        global,
        text(key),
        text("cpu"),
        int(numel),
        b"tQ".to_vec(),
        int(offset),
        tuple(size),
        tuple(stride),
        b"\x89ccollections\nOrderedDict\n)RtR".to_vec(),
    ]
    .concat()
}

/// `{name: tensor}` for each, protocol 2.
fn dict(items: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let items = items.iter().flat_map(|(name, value)| [text(name), value.clone()].concat());
    [b"\x80\x02}(".to_vec(), items.collect(), b"u.".to_vec()].concat()
}

fn read(bytes: &[u8]) -> Result<StateDict, String> {
    from_bytes(Path::new("evil.pt"), bytes).map_err(|e| e.to_string())
}

/// Asserts that the file is refused by one line that names it and contains `want`.
fn refused(bytes: &[u8], want: &str) {
    let message = read(bytes).expect_err(want);
    assert!(message.starts_with("evil.pt: ") && !message.contains('\n'), "{message:?}");
    assert!(message.contains(want), "{message:?} does not say {want:?}");
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

#[test]
fn code_is_refused_by_name() {
    let run = text("touch /tmp/owned");
    let call = |global: &[u8]| [b"\x80\x02", global, &run, b"\x85R."].concat();
    refused(&archive(&call(b"cposix\nsystem\n"), &[]), "posix.system");
    refused(&archive(&call(b"cos\nsystem\n"), &[]), "os.system");
    refused(&archive(&call(b"cbuiltins\neval\n"), &[]), "builtins.eval");
    refused(&archive(&call(b"ctorch.hub\nload\n"), &[]), "torch.hub.load");
    let whole_model = b"\x80\x02cmonai.networks.nets.unet\nUNet\n)\x81.";
    refused(&archive(whole_model, &[]), "monai.networks.nets.unet.UNet");
    refused(&archive(whole_model, &[]), "state_dict()");
    // Protocol 4 names classes by two strings on the stack.
    let stack_global = [b"\x80\x04\x8c\x02os\x8c\x06system\x93".as_slice(), &run, b"\x85R."].concat();
    refused(&archive(&stack_global, &[]), "os.system");
    // A listed class, called in a way that is not torch's.
    let odd = [b"\x80\x02ccollections\nOrderedDict\n".as_slice(), &run, b"\x85R."].concat();
    refused(&archive(&odd, &[]), "OrderedDict");
    // INST, OBJ, NEWOBJ, EXT1, REDUCE of a string: other ways to call.
    for op in [b'i', b'o', 0x81, 0x82, 0x92] {
        refused(&archive(&[0x80, 2, b'(', op, b'.'], &[]), &format!("opcode {op:#04x} at byte 3"));
    }
    refused(
        &archive(&[b"\x80\x02".as_slice(), &run, b")R."].concat(), &[]),
        "calls something that is no class",
    );
    // A name that is a terminal escape and a page long.
    let long = format!("c\x1b[2Jevil{}\nx\n", "y".repeat(5000));
    let message = read(&archive(&[b"\x80\x02", long.as_bytes()].concat(), &[])).unwrap_err();
    assert!(!message.contains('\x1b') && message.len() < 500, "{message:?}");
}

#[test]
fn impossible_tensors_are_refused() {
    let data = floats(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let with = |t: Vec<u8>| archive(&dict(&[("w", t)]), &[("data/0", &data)]);
    let f = |numel, offset, size: &[i64], stride: &[i64]| {
        with(tensor("FloatStorage", "0", numel, offset, size, stride))
    };
    refused(&f(7, 0, &[7], &[1]), "shorter than it claims");
    refused(&f(i64::MAX, 0, &[1], &[1]), "shorter than it claims");
    refused(&f(6, 4, &[3], &[1]), "beyond its storage");
    refused(&f(6, 0, &[2, 3], &[4, 1]), "beyond its storage");
    refused(&f(6, i64::MAX, &[2], &[1]), "beyond its storage");
    refused(&f(6, 0, &[i64::MAX, 2], &[i64::MAX, i64::MAX]), "evil");
    refused(&f(6, 0, &[1 << 31, 1 << 31, 1 << 31], &[0, 0, 0]), "evil");
    refused(&f(6, -1, &[2], &[1]), "in a way torch does not");
    refused(&f(6, 0, &[-2], &[1]), "in a way torch does not");
    refused(&f(6, 0, &[2], &[-1]), "in a way torch does not");
    refused(&f(6, 0, &[2, 3], &[1]), "in a way torch does not");
    refused(&f(6, 0, &[1; 9], &[1; 9]), "in a way torch does not");
    // Six numbers expanded to 2^40: the file's size does not allow it.
    refused(&f(6, 0, &[1 << 40], &[0]), "more numbers than the file has bytes");
    refused(&with(tensor("FloatStorage", "1", 6, 0, &[6], &[1])), "storage is not in the archive");
    refused(&with(tensor("IntStorage", "0", 6, 0, &[6], &[1])), "IntStorage");
    refused(&with(tensor("QInt8Storage", "0", 6, 0, &[6], &[1])), "torch.QInt8Storage");
    let t = || tensor("FloatStorage", "0", 6, 0, &[6], &[1]);
    refused(&archive(&dict(&[("w", t()), ("w", t())]), &[("data/0", &data)]), "w occurs twice");
    refused(&archive(b"\x80\x02}.", &[]), "holds no state_dict");
    refused(&archive(b"\x80\x05}.", &[]), "protocol 5");
    refused(&archive(&dict(&[("w", t())]), &[("data/0", &data), ("byteorder", b"big")]), "big-endian");
    refused(&archive(&dict(&[("w", t())]), &[("constants.pkl", b"")]), "TorchScript");
}

/// Views: offset, transposed, overlapping, shared, empty, scalar, expanded, and an axis of one with a wild stride.
#[test]
fn views_are_followed() {
    let data = floats(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    /// Size, stride, offset, elements.
    type View = (&'static [i64], &'static [i64], i64, &'static [f32]);
    let cases: [View; 8] = [
        (&[2, 3], &[3, 1], 0, &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]),
        (&[3, 2], &[1, 3], 0, &[0.0, 3.0, 1.0, 4.0, 2.0, 5.0]),
        (&[2], &[2], 3, &[3.0, 5.0]),
        (&[3, 2], &[1, 1], 1, &[1.0, 2.0, 2.0, 3.0, 3.0, 4.0]),
        (&[], &[], 5, &[5.0]),
        (&[0, 7], &[1 << 60, 1 << 60], 1 << 60, &[]),
        (&[2, 2], &[0, 5], 0, &[0.0, 5.0, 0.0, 5.0]),
        (&[1, 2, 1], &[i64::MAX, 1, i64::MAX], 4, &[4.0, 5.0]),
    ];
    let names: Vec<String> = (0..cases.len()).map(|i| format!("t{i}")).collect();
    let items: Vec<_> = names
        .iter()
        .zip(&cases)
        .map(|(name, (size, stride, offset, _))| {
            (name.as_str(), tensor("FloatStorage", "0", 6, *offset, size, stride))
        })
        .collect();
    let dict = read(&archive(&dict(&items), &[("data/0", &data)])).unwrap();
    for (name, (size, _, _, want)) in names.iter().zip(cases) {
        let array = dict.get(name).unwrap();
        assert_eq!(array.shape, size.iter().map(|&d| d as usize).collect::<Vec<_>>());
        assert_eq!(array.data, ArrayData::F32(want.to_vec().into()), "{name}");
    }
}

/// Deep, cyclic and repeated structures cost neither stack nor more than a bounded number of values.
#[test]
fn pickle_bombs_do_not_go_off() {
    // A million nested tuples, never unwound by recursion.
    let deep = [b"\x80\x02)".to_vec(), vec![0x85; 1_000_000], b".".to_vec()].concat();
    refused(&archive(&deep, &[]), "holds no state_dict");
    let values = [b"\x80\x02(".to_vec(), vec![b'N'; 3_000_000], b"t.".to_vec()].concat();
    refused(&archive(&values, &[]), "more than 1048576 values");
    // A dictionary that holds itself, as "model" too.
    let cyclic = [b"\x80\x02}q\x00".as_slice(), &text("model"), b"h\x00s."].concat();
    refused(&archive(&cyclic, &[]), "holds no state_dict");
    // Text whose stated length is not there.
    refused(&archive(b"\x80\x02X\xff\xff\xff\xff.", &[]), "cut short");
    // Lists that double by being appended to each other would need 2^k items; each append adds one reference.
    let doubling = [b"\x80\x02]q\x00".to_vec(), b"(h\x00h\x00e".repeat(50_000), b".".to_vec()].concat();
    refused(&archive(&doubling, &[]), "holds no state_dict");
}

/// Archives that torch would not write.
#[test]
fn odd_archives_are_refused() {
    let good = archive(
        &dict(&[("w", tensor("FloatStorage", "0", 1, 0, &[1], &[1]))]),
        &[("data/0", &floats(&[1.0]))],
    );
    read(&good).unwrap();
    let find = |bytes: &[u8], what: &[u8]| bytes.windows(what.len()).position(|w| w == what).unwrap();
    let central = find(&good, b"PK\x01\x02");
    let change = |at: usize, to: &[u8]| {
        let mut bytes = good.clone();
        bytes[at..at + to.len()].copy_from_slice(to);
        bytes
    };
    refused(&change(central + 10, &[8, 0]), "compressed");
    refused(&change(central + 8, &[1, 0]), "encrypted");
    refused(&change(central + 42, &[0xff; 4]), "damaged or cut short");
    refused(&change(find(&good, b"\x80\x02"), b"\x80\x03"), "checksum");
    let end = good.len() - 22;
    refused(&change(end + 10, &[0xff; 2]), "4 GiB");
    refused(&change(end + 10, &[200, 0]), "damaged or cut short");
    // Without a checksum (torch can be told so) the same content is read.
    read(&change(central + 16, &[0; 4])).unwrap();
    // Two directory entries over the same bytes: the last entry gets size and place of the one before.
    let mut twice = archive(b"\x80\x02}.", &[("data/0", &[7; 4096]), ("data/1", b"none")]);
    let heads: Vec<_> = (0..twice.len()).filter(|&at| twice[at..].starts_with(b"PK\x01\x02")).collect();
    for field in [20, 24, 42] {
        twice.copy_within(heads[1] + field..heads[1] + field + 4, heads[2] + field);
    }
    refused(&twice, "overlap");
}

/// The smallest network there is, in each format; the old torch format is made from the new one's pickle.
fn samples() -> Vec<(&'static str, Vec<u8>)> {
    let tmp = tempfile::tempdir().unwrap();
    let net = Net { norm: Norm::Batch, channels: vec![1, 2] };
    let mut weights = StateDict::new("small");
    for (name, shape) in names(&net) {
        let n = shape.iter().product::<usize>();
        let counter = name.ends_with("num_batches_tracked");
        let array = if counter { Array::i64(shape, vec![3; n]) } else { Array::f32(shape, vec![0.5; n]) };
        weights.insert(name, array).unwrap();
    }
    let path = tmp.path().join("x");
    write_pt(&path, &weights, Wrap::Model).unwrap();
    let zip = std::fs::read(&path).unwrap();
    write_safetensors(&path, &weights, &Metadata::from([("a".into(), "b".into())])).unwrap();
    let safetensors = std::fs::read(&path).unwrap();

    let mut reader = zip::ZipArchive::new(Cursor::new(&zip)).unwrap();
    let mut object = Vec::new();
    std::io::copy(&mut reader.by_name("archive/data.pkl").unwrap(), &mut object).unwrap();
    let mut legacy = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.".to_vec();
    legacy.extend([b"\x80\x02}".as_slice(), &text("little_endian"), b"\x88s."].concat());
    legacy.extend(object);
    legacy.extend(b"\x80\x02](");
    (0..weights.len()).for_each(|key| legacy.extend(text(&key.to_string())));
    legacy.extend(b"e.");
    for (_, array) in weights.iter() {
        let bytes = array.to_le_bytes();
        let numel: usize = array.shape.iter().product();
        legacy.extend([&(numel as u64).to_le_bytes(), bytes.as_slice()].concat());
    }
    let samples = vec![("zip", zip), ("legacy", legacy), ("safetensors", safetensors)];
    for (kind, bytes) in &samples {
        let back = read(bytes).unwrap();
        assert!(back.iter().eq(weights.iter()), "{kind}");
        assert_eq!(infer_net(&back).unwrap(), net);
    }
    samples
}

/// No prefix of a file is a file.
#[test]
fn every_prefix_is_refused() {
    for (kind, bytes) in samples() {
        for n in 0..bytes.len() {
            assert!(read(&bytes[..n]).is_err(), "{kind} cut at {n} of {}", bytes.len());
        }
    }
}

/// torch's own pickle, cut at every byte.
#[test]
fn every_prefix_of_torchs_pickle_is_refused() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/golden/pt/torch_seed_small_half.pt");
    let Ok(bytes) = std::fs::read(&file) else {
        println!("skipped: {} is not there", file.display());
        return;
    };
    // Its first entry is the pickle, 64 bytes into the file, and it ends with torch's only STOP before the padding.
    let whole = pickle::load(&bytes[64..]).unwrap();
    assert!(whole.length > 10_000);
    for n in 0..whole.length {
        assert!(pickle::load(&bytes[64..64 + n]).is_err(), "cut at {n}");
    }
}

/// Random bytes in random places: a result or a sentence, never a panic; and whatever is still read is as large as
/// its shapes say. The mutations include whole opcodes, lengths and sizes, since most bytes of a pickle are those.
#[test]
fn mutations_never_panic() {
    const OPS: &[u8] = b"\x80\x8a(tRQ\x85\x93cbhqXJu\xff\0";
    for (s, (kind, bytes)) in samples().into_iter().enumerate() {
        let mut refusals = 0;
        for round in 0..20_000 {
            let mut rng = Philox::keyed(42, &[s as u64, round]);
            let mut evil = bytes.clone();
            for _ in 0..=rng.below(4) {
                let at = rng.below(evil.len() as u64) as usize;
                match rng.below(4) {
                    0 => evil[at] = rng.next_u32() as u8,
                    1 => evil[at] ^= 1 << rng.below(8),
                    2 => evil[at] = OPS[rng.below(OPS.len() as u64) as usize],
                    _ => {
                        let other = rng.below(evil.len() as u64) as usize;
                        let n = rng.below(16).min((evil.len() - at.max(other)) as u64) as usize;
                        evil.copy_within(other..other + n, at);
                    }
                }
            }
            match read(&evil) {
                Err(message) => {
                    refusals += 1;
                    assert!(message.starts_with("evil.pt: "), "{message}");
                }
                Ok(dict) => {
                    let total: usize = dict.iter().map(|(_, array)| array.to_le_bytes().len()).sum();
                    assert!(total <= 8 * evil.len());
                    // Names and shapes may be anything: deducing the network must not panic either.
                    let _ = infer_net(&dict);
                }
            }
        }
        assert!(refusals > 1000, "{kind}: {refusals} refusals: the mutations do not reach the reader");
    }
}
