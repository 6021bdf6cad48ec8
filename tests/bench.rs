//! `spleen-hpc bench`: what it prints, refuses and leaves behind. No test asserts a time.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::{Map, Value};
use spleen_hpc::data::nifti_write::write_volume;
use spleen_hpc::data::volume::{Affine, Volume};

const IDENTITY: Affine =
    [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]];

/// Cheap rows: a layer of a few milliseconds, and a start of the program.
const LAYER: &str = "layer_bottom_residual_fprop";
const START: &str = "start_to_first_window";
const KEYS: [&str; 9] = [
    "name",
    "seconds_median",
    "seconds_min",
    "runs",
    "gflops",
    "share_of_peak",
    "share_of_roofline",
    "peak_rss_mib",
    "gbytes_per_second",
];

fn bench(args: &[&str]) -> Output {
    let program = env!("CARGO_BIN_EXE_spleen-hpc");
    Command::new(program).arg("bench").args(args).output().expect("the binary runs")
}

/// The rows of a call that succeeds.
#[track_caller]
fn rows(args: &[&str]) -> Vec<Map<String, Value>> {
    let out = bench(args);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let text = String::from_utf8(out.stdout).unwrap();
    text.lines().map(|line| serde_json::from_str(line).expect("one JSON object a line")).collect()
}

#[test]
fn rows_are_json_lines_with_the_same_keys() {
    let rows = rows(&["--json", "--threads", "1", "--only", LAYER, "peak_fma_f32"]);
    let names: Vec<_> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["peak_fma_f32", LAYER], "in the order of the table, whatever the order of --only");
    for row in &rows {
        let mut keys: Vec<_> = row.keys().map(String::as_str).collect();
        let mut want = KEYS;
        keys.sort();
        want.sort();
        assert_eq!(keys, want);
        let number = |key: &str| row[key].as_f64().unwrap();
        assert!(0.0 < number("seconds_min") && number("seconds_min") <= number("seconds_median"));
        assert!(number("runs") >= 3.0 && number("gflops") > 0.0 && number("share_of_peak") > 0.0);
        if cfg!(target_os = "linux") {
            assert!(number("peak_rss_mib") > 0.0);
        }
        assert!(row["gbytes_per_second"].is_null());
    }
    assert_eq!(rows[0]["share_of_peak"], 1.0);
    assert!(rows[0]["share_of_roofline"].is_null() && rows[1]["share_of_roofline"].as_f64().unwrap() > 0.0);
    // 4 patches of 6^3 voxels, 128 x 256 weights: what a 1x1x1 convolution costs, by hand.
    let flop = rows[1]["gflops"].as_f64().unwrap() * 1e9 * rows[1]["seconds_median"].as_f64().unwrap();
    let want = 2.0 * 4.0 * 216.0 * 128.0 * 256.0;
    assert!((flop - want).abs() < 1e-9 * want, "{flop}");
}

/// A pattern takes several rows, a comma separates, and the peak is no row where nobody asked for it.
#[test]
fn only_takes_patterns() {
    let rows = rows(&["--json", "--only", "layer_bottom_residual_[fd]*,copy_*"]);
    let names: Vec<_> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["copy_bandwidth", LAYER, "layer_bottom_residual_dgrad"]);
    assert!(rows[0]["gflops"].is_null() && rows[0]["share_of_peak"].is_null());
    assert!(rows[0]["gbytes_per_second"].as_f64().unwrap() > 0.0);
    assert!(rows[1]["share_of_peak"].as_f64().unwrap() > 0.0);
}

/// Every row of the network's convolutions is there, and `--only` chooses here, too.
#[test]
fn rows_can_be_listed() {
    let list = |args: &[&str]| String::from_utf8(bench(args).stdout).unwrap();
    let all = list(&["--list"]);
    let names: Vec<&str> = all.lines().collect();
    assert_eq!(names[..3], ["peak_fma_f32", "peak_bf16", "copy_bandwidth"], "the machine's own come first");
    // Four levels of 2 + 2 convolutions or pairs, a bottom of 3, three passes each; the image has no gradient.
    assert_eq!(names.iter().filter(|name| name.starts_with("layer_")).count(), 3 * (4 * 4 + 3) - 1);
    assert!(names.contains(&"layer_down0_conv0_residual_wgrad") && names.contains(&START));
    assert!(names.contains(&"scale_step_b8_96_c16_bf16"), "what must be asked for is listed, too");
    assert_eq!(list(&["--list", "--only", "step_*_f32"]), "step_b2_96_f32\n");
}

#[test]
fn a_table_for_people() {
    let out = bench(&["--only", LAYER]);
    let text = String::from_utf8(out.stdout).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert!(out.status.success() && lines.len() == 3, "{text}");
    assert!(lines[0].starts_with("cpu: ") && lines[1].starts_with("row "), "{text}");
    assert!(lines[2].starts_with(LAYER) && lines[2].contains("GFLOP/s") && lines[2].contains('%'), "{text}");
}

#[test]
fn what_cannot_be_timed_is_refused() {
    for (args, parts) in [
        (
            &["--only", "forward"][..],
            &["--only forward: no row has that name; `spleen-hpc bench --list` has them all"][..],
        ),
        (&["--only", LAYER, "nothing_*"], &["--only nothing_*: no row"]),
        (&["--only", "a["], &["--only a[: not a pattern"]),
        (&["--only"], &["a value is required"]),
        (&["--device", "cuda"], &["--device cuda:0: bench times the CPU only"]),
        (&["--device", "tpu"], &["`tpu` is not a device"]),
        (&["--threads", "100000"], &["--threads must be at most 4096, but is 100000"]),
    ] {
        let out = bench(args);
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{args:?}: {said}");
        assert!(out.stdout.is_empty(), "{args:?}");
        parts.iter().for_each(|part| assert!(said.contains(part), "{args:?}: wanted `{part}` in {said}"));
    }
}

/// The scan and the network are made once and are what the other verbs read.
#[test]
fn inputs_are_kept_and_used_again() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("inputs");
    let args = ["--json", "--only", START, "--inputs", folder.to_str().unwrap()];
    let first = rows(&args);
    assert_eq!(first[0]["runs"], 10);
    assert!(first[0]["gflops"].is_null() && first[0]["share_of_peak"].is_null());
    let files = || -> Vec<(String, std::time::SystemTime)> {
        let entries = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap());
        let mut list: Vec<_> = entries
            .map(|e| (e.file_name().into_string().unwrap(), e.metadata().unwrap().modified().unwrap()))
            .collect();
        list.sort();
        list
    };
    let made = files();
    let names: Vec<_> = made.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["ct.nii.gz", "label.nii.gz", "network.safetensors"]);
    rows(&args);
    assert_eq!(files(), made);

    // A scan of somebody else's is neither replaced nor timed.
    std::fs::remove_file(folder.join("label.nii.gz")).unwrap();
    let small = Volume { shape: [3, 4, 5], data: vec![1i16; 60], affine: IDENTITY };
    write_volume(folder.join("ct.nii.gz"), &small).unwrap();
    let before = std::fs::read(folder.join("ct.nii.gz")).unwrap();
    let out = bench(&args);
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{said}");
    assert!(said.contains("ct.nii.gz: has [3, 4, 5] voxels, bench times [512, 512, 90]"), "{said}");
    assert!(
        std::fs::read(folder.join("ct.nii.gz")).unwrap() == before && !folder.join("label.nii.gz").exists()
    );
}

/// A share is of the peak of the row's operands, and the least of rows of a size is what its network costs.
#[test]
fn bfloat16_has_a_peak_of_its_own() {
    let rows = rows(&["--json", "--only", "peak_*", "scale_forward_b1_32_c16_bf16"]);
    let number = |row: usize, key: &str| rows[row][key].as_f64().unwrap();
    let names: Vec<_> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["peak_fma_f32", "peak_bf16", "scale_forward_b1_32_c16_bf16"]);
    let share = number(2, "gflops") / number(1, "gflops");
    assert!((number(2, "share_of_peak") - share).abs() < 1e-9 * share);
    // Where memory is no bound the roofline is the peak; where it is, the bound is longer.
    assert!(number(2, "share_of_roofline") >= number(2, "share_of_peak") * (1.0 - 1e-9));
}

/// The process of a row says what is wrong with a file, and its asker says just that.
#[test]
fn a_broken_network_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().to_str().unwrap();
    std::fs::write(dir.path().join("network.safetensors"), b"no network").unwrap();
    let out = bench(&["--only", START, "--inputs", folder]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains("network.safetensors"), "{said}");
}

/// The process that `parent` started for row `name`, if it runs.
fn process_of(parent: u32, name: &str) -> Option<u32> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let mut ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let read =
        |id: u32, file: &str| std::fs::read_to_string(format!("/proc/{id}/{file}")).unwrap_or_default();
    ids.find(|&id| {
        // "pid (name) state ppid ..", where the name may hold anything.
        let stat = read(id, "stat");
        let owner = stat.rsplit(") ").next().and_then(|fields| fields.split(' ').nth(1));
        owner == Some(&parent.to_string()) && read(id, "cmdline").contains(name)
    })
}

/// Nothing goes on after an asker that could not say goodbye. Plain Rust takes minutes for this row.
#[test]
fn a_killed_bench_leaves_no_process() {
    if !Path::new("/proc/self/stat").exists() {
        println!("skipped: no /proc to look for processes in");
        return;
    }
    const ROW: &str = "step_b2_96_f32";
    let pause = || std::thread::sleep(std::time::Duration::from_millis(5));
    let temporary = tempfile::tempdir().unwrap();
    let mut parent = Command::new(env!("CARGO_BIN_EXE_spleen-hpc"))
        .args(["bench", "--json", "--only", ROW])
        .env("SPLEEN_SIMD", "portable")
        .env("TMPDIR", temporary.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let child = loop {
        assert!(parent.try_wait().unwrap().is_none(), "it ended by itself");
        match process_of(parent.id(), ROW) {
            Some(child) => break child,
            None => pause(),
        }
    };
    parent.kill().unwrap();
    parent.wait().unwrap();
    let runs = || std::fs::read(format!("/proc/{child}/cmdline")).is_ok_and(|line| !line.is_empty());
    (0..4000).take_while(|_| runs()).for_each(|_| pause());
    assert!(!runs(), "process {child} goes on");
}

/// One signal, even to the parent alone, ends it with the shell's code, and nothing is left running or lying about.
#[test]
fn a_signal_ends_it() {
    if !Path::new("/bin/sh").exists() {
        println!("skipped: no shell to send a signal with");
        return;
    }
    // While a row is timed, and while inputs are made.
    for row in ["step_b2_96_f32", START] {
        let temporary = tempfile::tempdir().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_spleen-hpc"))
            .args(["bench", "--json", "--only", LAYER, row])
            .env("TMPDIR", temporary.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // The folder for inputs is made after signals are watched.
        while std::fs::read_dir(temporary.path()).unwrap().next().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let kill = format!("kill -TERM {}", child.id());
        assert!(Command::new("/bin/sh").args(["-c", &kill]).status().unwrap().success());
        let out = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(130), "{said}");
        assert!(said.contains("interrupted: the row under way is given up"), "{said}");
        assert_eq!(std::fs::read_dir(temporary.path()).unwrap().count(), 0, "its folder is gone");
    }
}
