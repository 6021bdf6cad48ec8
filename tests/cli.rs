//! The real binary in temporary folders: what it says, what it leaves, and how it ends.

use std::path::Path;
use std::process::{Command, Output};

use spleen_hpc::config::{Config, Net, Norm, Recipe};
use spleen_hpc::nn::state_dict::{Array, StateDict, names};
use spleen_hpc::nn::weights::{Metadata, read_any, write_safetensors};

const VERBS: [&str; 9] =
    ["train", "evaluate", "infer", "phantom", "cache", "import", "export", "bench", "doctor"];

fn spleen(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_spleen-hpc"))
        .args(args)
        .current_dir(dir)
        .output()
        .expect("the binary runs")
}

fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

/// Exit code 2 and one sentence that contains `part`.
#[track_caller]
fn refused(dir: &Path, args: &[&str], part: &str) {
    let out = spleen(dir, args);
    let said = stderr(&out);
    assert_eq!(out.status.code(), Some(2), "{args:?}: {said}");
    let errors: Vec<&str> = said.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{args:?}: {said}");
    assert!(said.contains(part), "{args:?}: wanted `{part}` in: {said}");
    assert!(!said.contains("panicked"), "{said}");
}

/// Everything in a folder, by path below it.
fn listing(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let pattern = format!("{}/**/*", glob::Pattern::escape(&dir.to_string_lossy()));
    let files = glob::glob(&pattern).expect("a pattern").map(|path| path.expect("readable"));
    files
        .filter(|path| path.is_file())
        .map(|path| {
            let name = path.strip_prefix(dir).expect("below").display().to_string();
            (name, std::fs::read(&path).expect("readable"))
        })
        .collect()
}

/// A small network's weights, every number different.
fn weights(dir: &Path, name: &str) -> StateDict {
    let net = Net { norm: Norm::Batch, channels: vec![4, 6, 8] };
    let mut dict = StateDict::new(name);
    for (i, (name, shape)) in names(&net).into_iter().enumerate() {
        let n: usize = shape.iter().product();
        let array = match name.ends_with("num_batches_tracked") {
            true => Array::i64(shape, vec![7; n]),
            false => Array::f32(shape, (0..n).map(|j| (i * 1000 + j) as f32 * 1e-4).collect::<Vec<_>>()),
        };
        dict.insert(name, array).expect("names are unique");
    }
    let config = Config::for_recipe(Recipe::V059).record().to_string();
    write_safetensors(&dir.join(name), &dict, &Metadata::from([("config".into(), config)])).expect("written");
    dict
}

#[test]
fn every_verb_explains_itself() {
    let dir = tempfile::tempdir().unwrap();
    let all = spleen(dir.path(), &["--help"]);
    assert!(all.status.success());
    for verb in VERBS {
        assert!(String::from_utf8_lossy(&all.stdout).contains(verb), "{verb} is missing in --help");
        let out = spleen(dir.path(), &[verb, "--help"]);
        assert!(out.status.success(), "{verb}");
        assert!(String::from_utf8_lossy(&out.stdout).contains("Example"), "{verb} shows no example");
    }
    assert!(spleen(dir.path(), &["--version"]).status.success());
}

/// A verb shows the flags it uses and refuses the others.
#[test]
fn help_shows_what_a_verb_uses() {
    let dir = tempfile::tempdir().unwrap();
    let help = |verb| String::from_utf8(spleen(dir.path(), &[verb, "--help"]).stdout).unwrap();
    for (verb, shown, hidden) in [
        ("infer", "--overlap", "--lr"),
        ("cache", "--spacing", "--overlap"),
        ("evaluate", "--folds", "--patch"),
    ] {
        assert!(help(verb).contains(shown), "{verb} {shown}");
        assert!(!help(verb).contains(hidden), "{verb} {hidden}");
    }
    assert!(help("train").contains("--lr") && help("train").contains("--overlap"));
    refused(
        dir.path(),
        &["infer", "x.nii", "--weights", "w", "--out", "o", "--lr", "1"],
        "error: `spleen-hpc infer` has no use for --lr: leave it out",
    );
}

#[test]
fn bad_flags_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    refused(dir, &["train", "--learning-rate", "1"], "unexpected argument '--learning-rate'");
    refused(dir, &["segment"], "unrecognized subcommand 'segment'");
    refused(dir, &["train", "--patch", "90"], "--patch must be multiples of 16");
    refused(dir, &["train", "--patch", "96,96"], "neither a number nor three");
    refused(dir, &["train", "--overlap", "1.0"], "--overlap must be at least 0 and below 1, but is 1");
    refused(dir, &["train", "--recipe", "0.4"], "invalid value '0.4'");
    refused(dir, &["train", "--device", "tpu"], "`tpu` is not a device");
    refused(dir, &["train", "--device", "cuda:99"], "--device cuda:99: ");
    refused(dir, &["infer", "--weights", "w", "--out", "o"], "required arguments were not provided");
    refused(dir, &["phantom", "--out", "p", "--cases", "0", "--test-cases", "0"], "at least one case");
    assert!(listing(dir).is_empty(), "a refusal leaves nothing behind");
}

#[test]
fn missing_and_foreign_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    weights(dir, "w.safetensors");
    std::fs::write(dir.join("note.txt"), "neither scan nor weights").unwrap();
    let before = listing(dir);
    refused(dir, &["infer", "no.nii", "--weights", "w.safetensors", "--out", "o"], "no.nii: does not exist");
    refused(dir, &["infer", "*.nii", "--weights", "w.safetensors", "--out", "o"], "*.nii: matches no volume");
    refused(dir, &["infer", "note.txt", "--weights", "no.pt", "--out", "o"], "no.pt: cannot read");
    refused(
        dir,
        &["infer", "note.txt", "--weights", "note.txt", "--out", "o"],
        "note.txt: this is no weight file",
    );
    refused(dir, &["train", "--data", "no", "--run", "r"], "no: is not a folder");
    refused(dir, &["cache", "--data", "no"], "no: is not a folder");
    refused(dir, &["cache"], "--data DIR is needed");
    refused(dir, &["train", "--run", "r", "--resume"], "there is no run to go on with");
    refused(dir, &["import", "note.txt", "--out", "x.safetensors"], "note.txt: this is no weight file");
    refused(dir, &["import", "w.safetensors", "--out", "x.pt"], "must end in .safetensors");
    refused(dir, &["export", "w.safetensors", "--out", "x.onnx"], "must end in .pt or .safetensors");
    refused(dir, &["export", "w.safetensors", "--out", "w.safetensors"], "is the input: choose another name");
    assert_eq!(listing(dir), before, "a refusal leaves nothing behind");
}

#[test]
fn a_config_file_is_read_and_its_mistakes_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::write(dir.join("bad.toml"), "lr = 1e-3\nlearning-rate = 2\n").unwrap();
    refused(dir, &["train", "--config", "bad.toml"], "bad.toml: line 2: unknown key `learning-rate`");
    refused(dir, &["train", "--config", "no.toml"], "no.toml: cannot read");
    std::fs::write(dir.join("odd.toml"), "patch = 90\nepochs = 3\n").unwrap();
    refused(dir, &["train", "--config", "odd.toml"], "--patch must be multiples of 16");
    // A flag wins over the file: now the next thing is wrong.
    refused(dir, &["train", "--config", "odd.toml", "--patch", "96", "--data", "no"], "no: is not a folder");
}

#[test]
fn weights_go_to_torch_and_back_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let original = weights(dir, "w.safetensors");
    let same = |name: &str| {
        let read = read_any(&dir.join(name)).unwrap();
        assert!(read.iter().eq(original.iter()), "{name}");
    };
    for (args, made) in [
        (&["export", "w.safetensors", "--out", "bare.pt"][..], "bare.pt"),
        (&["export", "w.safetensors", "--out", "wrapped.pt", "--wrap"], "wrapped.pt"),
        (&["import", "wrapped.pt", "--out", "back.safetensors"], "back.safetensors"),
        (&["export", "back.safetensors", "--out", "again.safetensors"], "again.safetensors"),
    ] {
        let out = spleen(dir, args);
        assert!(out.status.success(), "{args:?}: {}", stderr(&out));
        same(made);
    }
}

/// The set is a pure function of its flags, and a folder with something else in it stays as it is.
#[test]
fn phantoms_and_their_cache() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for out in ["a", "b"] {
        let made =
            spleen(dir, &["phantom", "--out", out, "--cases", "2", "--test-cases", "0", "--seed", "5"]);
        assert!(made.status.success(), "{}", stderr(&made));
    }
    let a = listing(&dir.join("a"));
    assert!(a.iter().any(|(name, _)| name.contains("imagesTr")), "no image was made");
    assert!(a == listing(&dir.join("b")), "the same flags made other files");

    std::fs::create_dir(dir.join("mine")).unwrap();
    std::fs::write(dir.join("mine/notes.txt"), "keep").unwrap();
    refused(dir, &["phantom", "--out", "mine", "--cases", "1"], "mine");
    assert_eq!(listing(&dir.join("mine")), [("notes.txt".to_owned(), b"keep".to_vec())]);

    let args = ["cache", "--data", "a", "--cache-dir", "c", "--cache-dtype", "f32", "--threads", "1"];
    let first = spleen(dir, &args);
    assert!(first.status.success(), "{}", stderr(&first));
    let files = listing(&dir.join("c"));
    assert_eq!(files.len(), 2);
    let again = spleen(dir, &args);
    assert!(again.status.success() && listing(&dir.join("c")) == files, "{}", stderr(&again));
}

/// A run's folder is not overwritten by accident.
#[test]
fn an_earlier_run_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::create_dir(dir.join("run")).unwrap();
    std::fs::write(dir.join("run/last.safetensors"), "a checkpoint").unwrap();
    let part = "is the checkpoint of an earlier run: go on with --resume, or choose another --run";
    refused(dir, &["train", "--data", "d"], part);
}
