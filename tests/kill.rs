//! The real binary, killed and told to stop at any moment: what it leaves after `--resume` is, byte for byte, what an
//! undisturbed run leaves, whatever the number of threads.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime};

use spleen_hpc::data::phantom::{PhantomConfig, generate};
use spleen_hpc::rng::Philox;

/// Every draw of the tests is a function of it; each test prints what it drew.
const SEED: u64 = 20;
/// The start of the name of a file that is being written.
const WRITING: &str = ".writing-";
/// The numbers of a run of about a second: five epochs of two steps, each validated and saved.
const NUMBERS: &str =
    "--channels 4,6,8 --patch 16 --roi 48 --epochs 5 --val-interval 1 --val-cases 1 --lr 3e-3";
/// A checkpoint after every epoch, however short.
const SAVED: &str = "--save-interval 0";

/// Four labelled phantoms and one more, made once and kept from one call of the tests to the next.
static DATA: LazyLock<PathBuf> = LazyLock::new(|| {
    let data = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kill-phantoms");
    let set = PhantomConfig { cases: 4, test_cases: 1, seed: 3, full: false };
    generate(&data, &set, &|_, _| {}).expect("phantoms");
    data
});

/// A folder with runs and their cache.
struct Lab {
    dir: tempfile::TempDir,
}

impl Lab {
    fn new() -> Self {
        Lab { dir: tempfile::tempdir().expect("a temporary folder") }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `spleen-hpc ARGS` in the folder; ARGS are split at blanks.
    fn spleen(&self, args: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_spleen-hpc"));
        command.args(args.split_whitespace()).current_dir(self.dir.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Begins the run of this name, or goes on with it if it has a checkpoint.
    fn train(&self, run: &str, threads: usize) -> Command {
        let numbers = match self.path(run).join("last.safetensors").exists() {
            true => "--resume",
            false => NUMBERS,
        };
        let mut command = self.spleen(&format!("train --run {run} --threads {threads} {SAVED} {numbers}"));
        command.args(["--cache-dir", "cache", "--data"]).arg(&*DATA);
        command
    }

    /// Everything a run is for: weights, optimizer state, history, masks and scores, by name. Not config.toml and
    /// evaluation.json, which say how many threads there were.
    fn results(&self, run: &str) -> Vec<(String, Vec<u8>)> {
        let run = self.path(run);
        let mut files: Vec<PathBuf> =
            ["", "masks", "eval"].iter().flat_map(|f| files(&run.join(f))).collect();
        files.retain(|path| {
            let name = name_of(path);
            !name.starts_with(WRITING) && name != "config.toml" && name != "evaluation.json"
        });
        files.iter().map(|path| (name_of(path), std::fs::read(path).expect("readable"))).collect()
    }
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The files in a folder, sorted; none where there is no folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut files: Vec<PathBuf> = entries.filter(|path| path.is_file()).collect();
    files.sort();
    files
}

fn strays(folder: &Path) -> Vec<PathBuf> {
    files(folder).into_iter().filter(|path| name_of(path).starts_with(WRITING)).collect()
}

fn said(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

#[track_caller]
fn done(mut command: Command) -> String {
    let out = command.output().expect("the binary runs");
    assert_eq!(out.status.code(), Some(0), "{command:?}: {}", said(&out));
    said(&out)
}

/// Fails with the names of what differs, not with megabytes.
#[track_caller]
fn same(got: &[(String, Vec<u8>)], want: &[(String, Vec<u8>)], what: &str) {
    let names = |files: &[(String, Vec<u8>)]| files.iter().map(|f| f.0.clone()).collect::<Vec<_>>();
    assert_eq!(names(got), names(want), "{what}: other files");
    let differ: Vec<&String> = got.iter().zip(want).filter(|(a, b)| a != b).map(|(a, _)| &a.0).collect();
    assert!(differ.is_empty(), "{what}: {differ:?} differ from the undisturbed run");
}

/// SIGKILL, and whether it came before the process ended by itself.
fn kill(mut child: Child) -> bool {
    child.kill().ok();
    !child.wait().expect("a child").success()
}

/// The undisturbed run and how long it took, cache included.
fn reference(lab: &Lab) -> (Vec<(String, Vec<u8>)>, Duration) {
    let begun = Instant::now();
    done(lab.train("whole", 2));
    let results = lab.results("whole");
    for name in ["best.safetensors", "last.safetensors", "history.csv", "cases.csv", "spleen_04.nii.gz"] {
        assert!(results.iter().any(|(file, _)| file == name), "the run leaves no {name}");
    }
    (results, begun.elapsed())
}

/// What a killed run left: either a whole checkpoint, or none, and then `--resume` says so.
fn check_refusal_without_checkpoint(lab: &Lab, run: &str) {
    if !lab.path(run).join("last.safetensors").exists() {
        let out = lab.spleen(&format!("train --run {run} --resume")).output().expect("the binary runs");
        assert_eq!(out.status.code(), Some(2), "{}", said(&out));
        assert!(said(&out).contains("there is no run to go on with: leave --resume out"), "{}", said(&out));
    }
}

#[test]
fn a_run_killed_at_random_moments_ends_as_if_it_never_was() {
    let lab = Lab::new();
    let (want, whole) = reference(&lab);
    let mut random = Philox::keyed(SEED, &[1]);
    for attempt in 0..6 {
        let run = format!("killed-{attempt}");
        for kills in 0..3 {
            // The first one mostly early, before anything is saved.
            let early = if kills == 0 { 3 } else { 1 };
            let delay = whole.mul_f64(random.uniform().powi(early));
            let threads = 1 + random.below(3) as usize;
            let child = lab.train(&run, threads).spawn().expect("the binary runs");
            std::thread::sleep(delay);
            let killed = kill(child);
            let saved = lab.path(&run).join("last.safetensors").exists();
            println!("seed {SEED}, {run}: {threads} threads, {delay:?}, killed {killed}, checkpoint {saved}");
            check_refusal_without_checkpoint(&lab, &run);
            if !killed {
                break;
            }
        }
        done(lab.train(&run, 1 + attempt % 3));
        same(&lab.results(&run), &want, &run);
    }
}

#[test]
fn a_run_killed_while_it_writes_ends_as_if_it_never_was() {
    let lab = Lab::new();
    let (want, _) = reference(&lab);
    let (mut hit, mut random) = (0, Philox::keyed(SEED, &[2]));
    for attempt in 0..4 {
        let run = format!("killed-writing-{attempt}");
        for _ in 0..3 {
            // The n-th new file that is seen on its way into the run's folder, and a little later.
            let (mut writes, pause) = (random.below(5), random.below(1500));
            let mut seen = strays(&lab.path(&run));
            let before = seen.len();
            let mut child = lab.train(&run, 2).spawn().expect("the binary runs");
            while child.try_wait().expect("a child").is_none() {
                let now = strays(&lab.path(&run));
                let fresh = now.iter().any(|path| !seen.contains(path));
                seen = now;
                if fresh && writes == 0 {
                    std::thread::sleep(Duration::from_micros(pause));
                    break;
                }
                writes -= u64::from(fresh);
            }
            let killed = kill(child);
            let left = strays(&lab.path(&run)).len() - before;
            hit += left;
            println!(
                "seed {SEED}, {run}: {pause} us into a write, killed {killed}, {left} half-written files"
            );
            check_refusal_without_checkpoint(&lab, &run);
            if !killed {
                break;
            }
        }
        done(lab.train(&run, 2));
        same(&lab.results(&run), &want, &run);
    }
    println!("{hit} kills fell into a write");
}

/// Half-written files are cleared away when nobody can be writing them any more, and never before.
#[test]
fn the_next_start_clears_away_what_a_killed_one_was_writing() {
    let lab = Lab::new();
    done(lab.train("run", 2));
    let folders = ["run", "run/eval", "run/masks", "cache"];
    let hour = Duration::from_secs(3601);
    for folder in folders {
        for (name, age) in [(".writing-old", hour), (".writing-new", Duration::ZERO), ("mine", hour)] {
            let path = lab.path(folder).join(name);
            let file = std::fs::File::create(&path).expect("a file");
            file.set_modified(SystemTime::now() - age).expect("a file's time");
        }
    }
    done(lab.train("run", 2));
    for folder in folders {
        let is = |name: &str| lab.path(folder).join(name).exists();
        assert!(!is(".writing-old"), "{folder}: a dead run's file is still there");
        assert!(is(".writing-new"), "{folder}: a file was taken from under its writer");
        assert!(is("mine"), "{folder}: somebody else's file was removed");
    }
}

#[cfg(unix)]
#[test]
fn a_run_told_to_stop_saves_and_goes_on_as_if_it_never_had() {
    let lab = Lab::new();
    let (want, _) = reference(&lab);
    for signal in ["INT", "TERM"] {
        let mut stopped = false;
        // A run that ends before the signal reaches it has not shown anything: five tries.
        for attempt in 0..5 {
            let run = format!("{signal}-{attempt}");
            let mut child = lab.train(&run, 2).spawn().expect("the binary runs");
            let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
            while lines.next().is_some_and(|line| !line.expect("text").starts_with("training on")) {}
            let sent = Command::new("sh").args(["-c", &format!("kill -{signal} {}", child.id())]).status();
            assert!(sent.expect("a shell").success());
            let rest: Vec<String> = lines.map(|line| line.expect("text")).collect();
            let code = child.wait().expect("a child").code();
            if code == Some(130) && rest.iter().any(|line| line.contains("go on with: spleen-hpc train")) {
                stopped = true;
            }
            assert!(matches!(code, Some(0 | 130)), "{signal}: exit code {code:?}, {rest:?}");
            done(lab.train(&run, 3));
            same(&lab.results(&run), &want, &run);
            if stopped {
                break;
            }
        }
        assert!(stopped, "SIG{signal} never ended a run with exit code 130 and a word on how to go on");
    }
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let lab = Lab::new();
    let (want, _) = reference(&lab);
    let mut before: Option<Vec<Vec<u8>>> = None;
    for threads in [1, 2, 3] {
        let run = format!("threads-{threads}");
        done(lab.train(&run, threads));
        same(&lab.results(&run), &want, &run);

        let weights = format!("--weights whole/best.safetensors --threads {threads}");
        let (scores, masks) = (format!("scores-{threads}"), format!("masks-{threads}"));
        let data = DATA.display();
        let flags = format!("{weights} --data {data} --cases all --out {scores} --masks {masks}");
        done(lab.spleen(&format!("evaluate {flags}")));
        let bundle = format!("bundle-{threads}");
        let flags = format!("{weights} --out {bundle} --bundle-output {data}/imagesTs {data}/imagesTr");
        done(lab.spleen(&format!("infer {flags}")));
        let pattern =
            |folder: &str, ending: &str| format!("{}/{folder}/**/*{ending}", lab.dir.path().display());
        let paths = [pattern(&scores, ".csv"), pattern(&masks, ".nii.gz"), pattern(&bundle, ".nii.gz")];
        let found = paths.iter().flat_map(|pattern| glob::glob(pattern).expect("a pattern"));
        let bytes: Vec<Vec<u8>> =
            found.map(|path| std::fs::read(path.expect("readable")).expect("readable")).collect();
        assert!(bytes.len() >= 4 + 4 + 5, "{} files only", bytes.len());
        if let Some(before) = &before {
            assert!(bytes == *before, "{threads} threads: other scores or masks");
        }
        before = Some(bytes);
    }
}
