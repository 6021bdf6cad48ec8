//! What a user does from the first command to the last, with the real binary and a small network: phantoms, training,
//! scores, masks, weights to PyTorch and back, a longer training; then everything that can be typed wrong.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::LazyLock;

use spleen_hpc::data::nifti;
use spleen_hpc::data::nifti_write::write_volume;
use spleen_hpc::data::volume::Volume;
use spleen_hpc::nn::weights::read_safetensors;

/// A run of a second: enough to be wrong about everything but the files.
const NUMBERS: &str = "channels = [4, 6, 8]
patch = 16
roi = 48
epochs = 4
val-interval = 2
val-cases = 2
lr = 3e-3
";

/// A folder with `data`, a set of five phantoms and one without a label, and `run`, a training on it. Made anew by
/// each call of the tests.
static HOME: LazyLock<PathBuf> = LazyLock::new(|| {
    let home = Path::new(env!("CARGO_TARGET_TMPDIR")).join("workflow");
    std::fs::remove_dir_all(&home).ok();
    std::fs::create_dir_all(&home).expect("a folder");
    std::fs::write(home.join("numbers.toml"), NUMBERS).expect("a file");
    done(&home, "phantom --out data --cases 5 --test-cases 2 --seed 9");
    done(&home, "train --data data --run run --config numbers.toml");
    home
});

/// `spleen-hpc ARGS` in `dir`; ARGS are split at blanks.
fn spleen(dir: &Path, args: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_spleen-hpc"));
    command.args(args.split_whitespace()).current_dir(dir).output().expect("the binary runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What a successful command says on stdout.
#[track_caller]
fn done(dir: &Path, args: &str) -> String {
    let out = spleen(dir, args);
    assert_eq!(out.status.code(), Some(0), "{args}: {}{}", text(&out.stdout), text(&out.stderr));
    text(&out.stdout)
}

/// Exit code 2, one sentence that contains `part`, and no trace on the disk: where a folder for results is named it
/// is `made/none`.
#[track_caller]
fn refused(args: &str, part: &str) {
    let before = listing(&HOME);
    let out = spleen(&HOME, args);
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{args}: {said}");
    let errors: Vec<&str> = said.lines().filter(|line| line.starts_with("error: ")).collect();
    assert!(errors.len() == 1 && errors[0].contains(part), "{args}: wanted `{part}` in: {said}");
    assert!(!said.contains("panicked"), "{args}: {said}");
    let left = listing(&HOME) != before || HOME.join("made/none").exists();
    assert!(!left, "{args} left something behind");
}

/// Names of all files below a folder, sorted; caches, which any look at the data may fill, left out.
fn listing(dir: &Path) -> Vec<String> {
    let pattern = format!("{}/**/*", glob::Pattern::escape(&dir.to_string_lossy()));
    let options = glob::MatchOptions { require_literal_leading_dot: true, ..Default::default() };
    let files =
        glob::glob_with(&pattern, options).expect("a pattern").flatten().filter(|path| path.is_file());
    let names = files.map(|path| path.strip_prefix(dir).expect("below").display().to_string());
    names.filter(|name| !name.starts_with("made/")).collect()
}

fn bytes(name: impl AsRef<Path>) -> Vec<u8> {
    std::fs::read(HOME.join(&name)).unwrap_or_else(|e| panic!("{}: {e}", name.as_ref().display()))
}

fn json(name: &str) -> serde_json::Value {
    serde_json::from_slice(&bytes(name)).expect("JSON")
}

fn lines(name: &str) -> Vec<String> {
    text(&bytes(name)).lines().map(str::to_owned).collect()
}

#[test]
fn a_run_leaves_what_it_says() {
    let home = &*HOME;
    for name in ["best.safetensors", "last.safetensors", "config.toml", "history.csv"] {
        assert!(home.join("run").join(name).is_file(), "no {name}");
    }
    let history = lines("run/history.csv");
    assert_eq!(history[0], "epoch,train_loss,val_mean_dice");
    let validated: Vec<bool> = history[1..].iter().map(|line| !line.ends_with(',')).collect();
    assert_eq!(validated, [false, true, false, true], "epochs 2 and 4 of 4 are validated: {history:?}");

    let (_, metadata) = read_safetensors(&home.join("run/best.safetensors")).expect("weights");
    let keys: Vec<&str> = metadata.keys().map(String::as_str).collect();
    assert_eq!(keys, ["commit", "config", "epoch", "split", "val_mean_dice"]);
    let config: serde_json::Value = serde_json::from_str(&metadata["config"]).expect("JSON");
    assert_eq!(config["channels"], serde_json::json!([4, 6, 8]));
    let split: serde_json::Value = serde_json::from_str(&metadata["split"]).expect("JSON");
    assert_eq!(split["val"], serde_json::json!(["spleen_04", "spleen_05"]));
    let best = history[1..].iter().filter_map(|line| {
        let mut fields = line.split(',').skip(2);
        fields.next()?.parse::<f64>().ok().map(|dice| (dice, line.split(',').next().unwrap_or("").to_owned()))
    });
    let best = best.fold((f64::MIN, String::new()), |a, b| if b.0 > a.0 { b } else { a });
    assert_eq!((&metadata["epoch"], &metadata["val_mean_dice"]), (&best.1, &best.0.to_string()));

    for case in ["spleen_04", "spleen_05"] {
        let mask = nifti::read(home.join(format!("run/masks/{case}.nii.gz"))).expect("a mask");
        let scan = nifti::read_header(home.join(format!("data/imagesTr/{case}.nii.gz"))).expect("a scan");
        assert_eq!((mask.header.shape, mask.header.affine), (scan.shape, scan.affine), "{case}");
    }
}

/// One line an epoch, every column where it was the epoch before.
#[test]
fn a_training_tells_in_columns() {
    let out = done(&HOME, "train --data data --run made/columns --config numbers.toml --epochs 10");
    let epochs: Vec<&str> = out.lines().filter(|line| line.starts_with("epoch ")).collect();
    assert_eq!(epochs.len(), 10, "{out}");
    for column in ["  loss ", " patches/s", "  ETA "] {
        let places: Vec<_> = epochs.iter().map(|line| line.find(column)).collect();
        assert!(places[0].is_some() && places.iter().all(|place| *place == places[0]), "{column}: {out}");
    }
    assert!(epochs[0].starts_with("epoch  1/10 ") && epochs[9].ends_with("ETA 0s"), "{out}");
    for word in [
        "weights: made/columns/best.safetensors",
        "masks:   made/columns/masks",
        "scores:  made/columns/eval",
        "next: ",
    ] {
        assert!(out.lines().any(|line| line.starts_with(word)), "no `{word}` in {out}");
    }
}

#[test]
fn evaluation_has_the_names_and_columns_of_the_bundle() {
    done(
        &HOME,
        "evaluate --weights run/best.safetensors --data data --out made/eval --cases all --masks made/em",
    );
    assert_eq!(lines("made/eval/metrics.csv").len(), 1);
    assert!(lines("made/eval/metrics.csv")[0].starts_with("val_mean_dice,"));
    let raw = lines("made/eval/val_mean_dice_raw.csv");
    assert_eq!((raw[0].as_str(), raw.len()), ("filename,class0,mean", 6));
    assert!(raw[1].contains("spleen_01.nii.gz,"), "{raw:?}");
    let summary = lines("made/eval/val_mean_dice_summary.csv");
    assert_eq!(summary[0], "class,mean,median,max,min,90percentile,std,notnans");
    assert!(summary.len() == 3 && summary[1].starts_with("class0,") && summary[2].starts_with("mean,"));
    let cases = lines("made/eval/cases.csv");
    assert_eq!(
        cases[0],
        "case,dice_bundle,dice_native,dice_grid,hd95_mm,hd_mm,assd_mm,nsd,nsd_tolerance_mm,volume_pred_ml,\
         volume_true_ml,voxels_pred,voxels_true,false_positive_voxels,false_negative_voxels,image"
    );
    assert_eq!(cases.len(), 6);
    let origin = json("made/eval/evaluation.json");
    assert_eq!(origin["weights"], "run/best.safetensors");
    assert_eq!(origin["config"]["roi"], serde_json::json!([48, 48, 48]), "the weights' own window");
    // The same two cases, scored at the end of the training.
    let end = lines("run/eval/cases.csv");
    let numbers = |line: &str| line.rsplit_once(',').map(|(numbers, _)| numbers.to_owned());
    assert_eq!(numbers(&end[1]), numbers(&cases[4]));
    assert_eq!(bytes("made/em/spleen_04.nii.gz"), bytes("run/masks/spleen_04.nii.gz"));
}

#[test]
fn inference_takes_files_folders_and_globs_and_weights_go_to_torch_and_back() {
    let infer = |weights: &str, out: &str, inputs: &str| {
        done(&HOME, &format!("infer --weights {weights} --roi 48 --recipe seed --out made/{out} {inputs}"));
        listing(&HOME.join("made").join(out))
    };
    let best = "run/best.safetensors";
    let two = ["spleen_06.nii.gz", "spleen_07.nii.gz", "statistics.json"];
    assert_eq!(infer(best, "folder", "data/imagesTs"), two);
    assert_eq!(infer(best, "glob", "data/imagesTs/*.gz"), two);
    assert_eq!(infer(best, "files", "data/imagesTs/spleen_07.nii.gz data/imagesTs/spleen_06.nii.gz"), two);
    done(&HOME, &format!("export {best} --out made/model.pt"));
    done(&HOME, "import made/model.pt --out made/back.safetensors");
    assert_eq!(infer("made/model.pt", "pt", "data/imagesTs"), two);
    assert_eq!(infer("made/back.safetensors", "back", "data/imagesTs"), two);
    for other in ["glob", "files", "pt", "back"] {
        for name in &two[..2] {
            let same = bytes(format!("made/{other}/{name}")) == bytes(format!("made/folder/{name}"));
            assert!(same, "{other}: {name} differs");
        }
    }

    let bundle = infer(best, "bundle", "--bundle-output data/imagesTs");
    let want = ["spleen_06/spleen_06_trans.nii.gz", "spleen_07/spleen_07_trans.nii.gz", "statistics.json"];
    assert_eq!(bundle, want);
    for (name, plain) in want.iter().zip(two).take(2) {
        let read = |name: &str| nifti::read(HOME.join(name)).expect("a mask").volume.data;
        assert!(read(&format!("made/bundle/{name}")) == read(&format!("made/folder/{plain}")), "{name}");
    }

    let statistics = json("made/folder/statistics.json");
    assert_eq!(statistics["weights"], best);
    assert_eq!(statistics["failed"], serde_json::json!([]));
    let case = &statistics["cases"][0];
    assert_eq!(case["input"], "data/imagesTs/spleen_06.nii.gz");
    assert_eq!(case["output"], "made/folder/spleen_06.nii.gz");
    let mask = nifti::read(HOME.join("made/folder/spleen_06.nii.gz")).expect("a mask");
    assert_eq!(case["shape"], serde_json::json!(mask.header.shape));
    let voxels = mask.volume.data.iter().filter(|v| **v != 0.0).count();
    assert_eq!(case["voxels"], voxels);
    let spacing: f64 =
        case["spacing_mm"].as_array().expect("three").iter().filter_map(|v| v.as_f64()).product();
    let ml = case["volume_ml"].as_f64().expect("a number");
    // The volume comes from the determinant of the affine, here from the product of its column norms.
    assert!((ml - voxels as f64 * spacing / 1000.0).abs() <= 1e-6 * ml, "{ml} ml of {voxels} voxels");
    assert!(case["seconds"]["network"].as_f64().is_some_and(|s| s > 0.0));
}

/// `--amp on` reaches the CPU's convolutions, in inference and in training: other results than f32, the same ones on any
/// number of threads and any vector unit.
#[test]
fn mixed_precision_on_the_cpu() {
    let infer = |out: &str, flags: &str| {
        let args =
            format!("infer --weights run/best.safetensors --roi 48 --device cpu {flags} --out made/{out}");
        let said = spleen(&HOME, &format!("{args} data/imagesTs/spleen_06.nii.gz"));
        assert!(said.status.success(), "{}", text(&said.stderr));
        let mixed = text(&said.stderr).contains("in mixed precision (bfloat16), as asked");
        (mixed, bytes(format!("made/{out}/spleen_06.nii.gz")))
    };
    let single = infer("amp-auto", "");
    assert_eq!(single, infer("amp-off", "--amp off"));
    let mixed = infer("amp-on", "--amp on --threads 1");
    assert_eq!(mixed, infer("amp-on-2", "--amp on --threads 2"));
    assert_eq!((single.0, mixed.0), (false, true));
    assert!(single.1 != mixed.1, "not a voxel changes");

    let train = |name: &str, flags: &str| {
        done(&HOME, &format!("train --data data --run made/{name} --config numbers.toml --epochs 2 {flags}"));
        bytes(format!("made/{name}/last.safetensors"))
    };
    assert!(train("run-off", "--amp off") != train("run-on", "--amp on"));
}

#[test]
fn a_finished_run_is_made_longer() {
    let folder = HOME.join("made/longer");
    std::fs::create_dir_all(&folder).expect("a folder");
    for name in ["best.safetensors", "last.safetensors", "config.toml", "history.csv"] {
        std::fs::copy(HOME.join("run").join(name), folder.join(name)).expect("a copy");
    }
    let out = done(&HOME, "train --run made/longer --resume --epochs 6");
    let epochs: Vec<&str> = out.lines().filter(|line| line.starts_with("epoch ")).collect();
    assert!(epochs.len() == 2 && epochs[0].starts_with("epoch 5/6 "), "{out}");
    let (before, after) = (lines("run/history.csv"), lines("made/longer/history.csv"));
    assert_eq!((&after[..5], after.len()), (&before[..], 7));

    // What does not fit the run is refused and leaves the run as it is.
    for (flags, part) in [
        ("--optimizer novograd", "--resume goes on with the run's own --optimizer: leave it out"),
        ("--channels 4,8,8", "the run's own --channels"),
        ("--recipe 0.5.9", "the run's own --recipe"),
        ("--val-cases 1", "was trained on another split of the cases"),
        ("--epochs 1000000000000", "which cannot be counted"),
    ] {
        let (config, last) = (bytes("made/longer/config.toml"), bytes("made/longer/last.safetensors"));
        refused(&format!("train --run made/longer --resume {flags}"), part);
        assert!(config == bytes("made/longer/config.toml"), "{flags} changed config.toml");
        assert!(last == bytes("made/longer/last.safetensors"), "{flags} changed the checkpoint");
    }
    refused("train --run made/longer", "is the checkpoint of an earlier run: go on with --resume");
    done(&HOME, "train --run made/longer --resume");
}

#[test]
fn one_bad_scan_does_not_keep_the_others() {
    std::fs::create_dir_all(HOME.join("made")).expect("a folder");
    std::fs::write(HOME.join("made/noise.nii.gz"), b"this is no scan").expect("a file");
    let args = "infer --weights run/best.safetensors --out made/mixed made/noise.nii.gz data/imagesTs";
    let out = spleen(&HOME, args);
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{said}");
    assert!(said.contains("error: made/noise.nii.gz: "), "{said}");
    assert!(said.contains("error: 1 of 3 scans have no mask, see above"), "{said}");
    let made = listing(&HOME.join("made/mixed"));
    assert_eq!(made, ["spleen_06.nii.gz", "spleen_07.nii.gz", "statistics.json"]);
    let statistics = json("made/mixed/statistics.json");
    assert_eq!(statistics["cases"].as_array().map(Vec::len), Some(2));
    assert_eq!(statistics["failed"][0]["input"], "made/noise.nii.gz");
}

#[test]
fn wrong_files_are_named_in_one_sentence() {
    let weights = "--weights run/best.safetensors";
    refused("infer --weights none.pt --out made/none data/imagesTs", "none.pt: cannot read: ");
    refused(
        "infer --weights data/dataset.json --out made/none data/imagesTs",
        "dataset.json: this is no weight file",
    );
    std::fs::create_dir_all(HOME.join("made/void")).expect("a folder");
    refused(&format!("infer {weights} --out made/none made/void"), "void: holds no volume");
    refused(
        &format!("infer {weights} --out run/config.toml data/imagesTs"),
        "is a file where a folder is needed",
    );
    refused(&format!("infer {weights} --out /proc/o data/imagesTs"), "/proc/o: cannot create: ");
    refused(&format!("infer {weights} --out data/imagesTs data/imagesTs"), "would overwrite the scan");
    refused(&format!("evaluate {weights} --data made/void"), "void: ");
    refused(
        &format!("evaluate {weights} --data data --cases all --out eval --masks data/labelsTr"),
        "--masks would overwrite",
    );
    // Weights of another network: the names are right, a shape is not.
    let (mut other, _) = (read_safetensors(&HOME.join("run/best.safetensors")).expect("weights"), ());
    let mut cut = spleen_hpc::nn::state_dict::StateDict::new("other");
    for (name, array) in other.0.iter().skip(3) {
        cut.insert(name, array.clone()).expect("unique");
    }
    other.1.clear();
    let path = HOME.join("made/other.safetensors");
    spleen_hpc::nn::weights::write_safetensors(&path, &cut, &other.1).expect("written");
    refused(
        "infer --weights made/other.safetensors --out made/none data/imagesTs",
        "made/other.safetensors: ",
    );
}

/// A copy of the first phantom whose label is changed by `change`.
fn set_with_label(name: &str, change: impl Fn(&mut Volume<u8>)) {
    let set = HOME.join("made").join(name);
    for folder in ["imagesTr", "labelsTr"] {
        std::fs::create_dir_all(set.join(folder)).expect("a folder");
    }
    for case in ["a", "b"] {
        std::fs::copy(
            HOME.join("data/imagesTr/spleen_01.nii.gz"),
            set.join(format!("imagesTr/{case}.nii.gz")),
        )
        .expect("a copy");
        let label = nifti::read(HOME.join("data/labelsTr/spleen_01.nii.gz")).expect("a label").volume;
        let data = label.data.iter().map(|&v| v as u8).collect();
        let mut label = Volume { shape: label.shape, data, affine: label.affine };
        change(&mut label);
        write_volume(set.join(format!("labelsTr/{case}.nii.gz")), &label).expect("written");
    }
}

#[test]
fn labels_that_do_not_fit_are_named() {
    set_with_label("many", |label| label.data.iter_mut().for_each(|v| *v *= 3));
    let train =
        |set: &str| format!("train --data made/{set} --run made/t-{set} --config numbers.toml --val-cases 1");
    refused(&train("many"), "name the spleen with --label-value N");
    done(&HOME, &format!("{} --label-value 3", train("many")));
    set_with_label("beside", |label| label.affine[0][3] += 5.0);
    refused(&train("beside"), "beside its image");
    set_with_label("short", |label| {
        label.shape[2] -= 1;
        label.data = vec![0; label.shape.iter().product()];
    });
    refused(&train("short"), "voxels, its image");
}

#[test]
fn absurd_numbers_are_refused_before_any_work() {
    let train = |flags: &str| format!("train --data data --run made/none --config numbers.toml {flags}");
    let infer =
        |flags: &str| format!("infer --weights run/best.safetensors --out made/none data/imagesTs {flags}");
    refused(&train("--learning-rate 1"), "unexpected argument '--learning-rate'");
    refused(&train("--samples-per-volume 0"), "--samples-per-volume must be at least 1");
    for command in [train, infer] {
        refused(&command("--roi 50"), "--roi must be multiples of 4 for a network of 3 levels");
        refused(&command("--sw-batch 0"), "--sw-batch must be at least 1");
        refused(&command("--threads 100000"), "--threads must be at most 4096");
        refused(&command("--spacing 0"), "--spacing must be above 0 mm");
    }
    refused("train --data data --run made/none --epochs 0", "--epochs must be at least 1");
    std::fs::create_dir_all(HOME.join("made")).expect("a folder");
    std::fs::write(HOME.join("made/bad.toml"), "epochs = 2\nlearning-rate = 1\n").expect("a file");
    refused(
        "train --data data --run made/none --config made/bad.toml",
        "bad.toml: line 2: unknown key `learning-rate`",
    );
    if cfg!(target_os = "linux") {
        for command in [train, infer] {
            refused(&command("--roi 65536"), "--roi [65536, 65536, 65536] needs over ");
        }
        let huge =
            ["--samples-per-volume 1000000000", "--patch 65536", "--channels 4096,4096,4096,4096,4096,4096"];
        for flags in huge {
            refused(&format!("train --data data --run made/none --roi 64 {flags}"), "a step on ");
        }
    }
    done(&HOME, &infer("--sw-batch 1000000000").replace("made/none", "made/wide"));
}
