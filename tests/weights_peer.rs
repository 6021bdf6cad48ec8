//! Weight files to and from the PyTorch and MONAI that are installed, if they are: `SPLEEN_PYTHON` names the
//! interpreter (default python3). weights_peer.py is the other side.

use std::path::Path;
use std::process::Command;

use safetensors::{Dtype, SafeTensors};
use spleen_hpc::config::{Net, Norm};
use spleen_hpc::nn::pt_write::{Wrap, write_pt};
use spleen_hpc::nn::state_dict::{StateDict, infer_net, names};
use spleen_hpc::nn::weights::{Metadata, read_any, write_safetensors};

/// Names in order and every number, bit for bit.
fn equals(dict: &StateDict, reference: &SafeTensors) -> bool {
    let same = |(name, array): (&str, &spleen_hpc::nn::state_dict::Array)| {
        reference.tensor(name).is_ok_and(|want| {
            let dtype = if want.dtype() == Dtype::I64 { "I64" } else { "F32" };
            want.shape() == array.shape && dtype == array.dtype() && want.data() == array.to_le_bytes()
        })
    };
    dict.len() == reference.len() && dict.iter().all(same)
}

/// One network's folder: reads all that torch wrote, writes what torch shall read. Returns the number of files read.
fn exchange(dir: &Path) -> usize {
    let label = dir.file_name().unwrap().to_str().unwrap();
    let mut parts = label.split('-');
    let norm = if parts.next() == Some("batch") { Norm::Batch } else { Norm::Instance };
    let net = Net { norm, channels: parts.map(|c| c.parse().unwrap()).collect() };
    let listed: Vec<(String, Vec<usize>)> =
        serde_json::from_slice(&std::fs::read(dir.join("names.json")).unwrap()).unwrap();
    assert_eq!(names(&net), listed, "{label}");

    let mut files = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "pt") {
            continue;
        }
        let dict = read_any(&path).unwrap();
        let bytes = std::fs::read(path.with_extension("ref")).unwrap();
        assert!(equals(&dict, &SafeTensors::deserialize(&bytes).unwrap()), "{}", path.display());
        assert!(dict.iter().map(|(name, _)| name).eq(listed.iter().map(|(name, _)| name.as_str())));
        assert_eq!(infer_net(&dict).unwrap(), net, "{}", path.display());
        files += 1;
    }
    let bare = read_any(&dir.join("bare.pt")).unwrap();
    // torch's own safetensors file, whose order is another, comes back in the network's order.
    assert!(read_any(&dir.join("bare.ref")).unwrap().iter().eq(bare.iter()));
    write_pt(&dir.join("out_bare.pt"), &bare, Wrap::Bare).unwrap();
    write_pt(&dir.join("out_model.pt"), &bare, Wrap::Model).unwrap();
    let metadata = Metadata::from([("recipe".into(), "seed".into()), ("commit".into(), "0".into())]);
    write_safetensors(&dir.join("out.safetensors"), &bare, &metadata).unwrap();
    files
}

#[test]
fn torch_and_monai_agree() {
    let python = std::env::var("SPLEEN_PYTHON").unwrap_or_else(|_| "python3".into());
    let imports = "import torch, monai, ignite, safetensors";
    let probe = Command::new(&python).args(["-c", imports]).output();
    if !probe.is_ok_and(|out| out.status.success()) {
        println!("skipped: {python} cannot `{imports}` (SPLEEN_PYTHON names another interpreter)");
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/weights_peer.py");
    let run = |what: &str| {
        let out = Command::new(&python).arg(&script).arg(what).arg(tmp.path()).output().unwrap();
        assert!(out.status.success(), "{what}: {}", String::from_utf8_lossy(&out.stderr));
    };
    run("make");
    let folders: Vec<_> =
        std::fs::read_dir(tmp.path()).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()).collect();
    let files: usize = folders.iter().map(|dir| exchange(dir)).sum();
    assert_eq!((folders.len(), files), (8, 8 * 17));
    let said = |name: &str| read_any(&tmp.path().join(name)).unwrap_err().to_string();
    assert!(said("whole.pt").contains("monai.networks.nets.unet.UNet"), "{}", said("whole.pt"));
    assert!(said("script.pt").contains("TorchScript"), "{}", said("script.pt"));
    run("check");
}
