//! Records the commit the binary is built from; every checkpoint, cache and report carries it. Lists the CUDA kernels,
//! whose text the binary carries. With the feature `emulator` it also compiles them as C++, to be run on the CPU
//! (tests/emulator).

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn main() {
    let git = |args: &[&str]| {
        let out = Command::new("git").args(args).output().ok()?;
        out.status.success().then(|| String::from_utf8_lossy(&out.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "unknown".into());
    println!("cargo::rustc-env=SPLEEN_COMMIT={commit}");
    // HEAD's log grows with every commit, checkout and reset.
    if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"]) {
        println!("cargo::rerun-if-changed={log}");
    }
    println!("cargo::rerun-if-changed=build.rs");
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    embed_kernels(&root.join("kernels"), &out.join("kernels.rs"));
    println!("cargo::rustc-check-cfg=cfg(emulated, emulator_sanitized)");
    #[cfg(feature = "emulator")]
    emulator::build(&root, &out);
}

/// Writes the two tables that src/device/cuda/sources.rs includes: name and text of every kernel file and header.
fn embed_kernels(folder: &Path, table: &Path) {
    println!("cargo::rerun-if-changed={}", folder.display());
    let mut text = String::new();
    for (constant, extension) in [("KERNELS", "cu"), ("HEADERS", "cuh")] {
        text += &format!("const {constant}: &[(&str, &str)] = &[\n");
        for path in files(folder, extension) {
            let name = path.file_name().and_then(|name| name.to_str()).expect("kernels have plain names");
            text += &format!("    ({name:?}, include_str!({path:?})),\n");
        }
        text += "];\n";
    }
    fs::write(table, text).expect("OUT_DIR is writable");
}

/// Files of a folder with this extension, sorted.
fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let entries =
        fs::read_dir(folder).expect("a folder of the source").map(|entry| entry.expect("readable").path());
    let mut list: Vec<_> = entries.filter(|path| path.extension().is_some_and(|e| e == extension)).collect();
    list.sort();
    list
}

#[cfg(feature = "emulator")]
mod emulator {
    use super::files;
    use std::hash::{DefaultHasher, Hash, Hasher};
    use std::path::{Path, PathBuf};
    use std::{env, fs};

    /// Names a sanitizer to build the emulator with, `address` or `thread`: scripts/sanitize.sh.
    const SANITIZER: &str = "SPLEEN_EMULATOR_SANITIZER";

    /// Compiles every kernel twice (fp16 and f32 storage) and the machine that runs them. Without a C++ compiler the
    /// cfg `emulated` stays unset, and tests that need the emulator say that they are skipped.
    pub fn build(root: &Path, out: &Path) {
        println!("cargo::rerun-if-changed=tests/emulator");
        println!("cargo::rerun-if-env-changed={SANITIZER}");
        let x86_linux = env::var("CARGO_CFG_TARGET_ARCH").as_deref() == Ok("x86_64")
            && env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux");
        let mut compiler = cc::Build::new();
        compiler.cpp(true);
        // cc names a compiler without trying whether it is there.
        let answers = compiler.try_get_compiler().is_ok_and(|compiler| {
            compiler.to_command().arg("--version").output().is_ok_and(|out| out.status.success())
        });
        if !x86_linux || !answers {
            println!("cargo::warning=no C++ compiler for x86-64 Linux: the kernels are not emulated");
            return;
        }
        let mut build = cc::Build::new();
        build.cpp(true).std("c++20").opt_level(2).debug(true).warnings(false);
        build.include(root.join("kernels")).include(root.join("tests/emulator"));
        // Kernels reinterpret shared memory; sums must be rounded as they are written. Nothing is asked of the CPU here:
        // what has a faster path chooses it when it runs.
        build.flags(["-fno-strict-aliasing", "-ffp-contract=off", "-ftls-model=initial-exec", "-Wno-psabi"]);
        let mut headers = files(&root.join("kernels"), "cuh");
        headers.extend(files(&root.join("tests/emulator"), "hpp"));
        let shared = headers.iter().map(|path| read(path)).collect::<String>();
        let mut units: Vec<Unit> = files(&root.join("tests/emulator"), "cpp")
            .into_iter()
            .map(|source| Unit { text: read(&source), source, machine: true })
            .collect();
        let mut kernels = files(&root.join("kernels"), "cu");
        kernels.extend(files(&root.join("tests/emulator"), "cu"));
        for kernel in &kernels {
            let text = read(kernel);
            units.extend([16, 32].map(|bits| {
                let (source, wrapper) = translation_unit(out, kernel, bits);
                Unit { source, text: wrapper + &text, machine: false }
            }));
        }
        let sanitizer = env::var(SANITIZER).unwrap_or_default();
        sanitize(&mut build, &sanitizer);
        let objects = compile(&build, &units, out, &(shared + &sanitizer));
        build.objects(&objects);
        build.cargo_metadata(false);
        build.compile("cuemu");
        println!("cargo::rustc-link-search=native={}", out.display());
        // Whole: kernels are found by the list they enter when the program starts, not by symbols.
        println!("cargo::rustc-link-lib=static:+whole-archive=cuemu");
        println!("cargo::rustc-link-lib=stdc++");
        println!("cargo::rustc-cfg=emulated");
    }

    /// The address sanitizer watches kernels and machine; the thread sanitizer, kernels only (tests/emulator/sanitizer.hpp).
    /// Their libraries must be loaded first of all: the script preloads them.
    fn sanitize(build: &mut cc::Build, sanitizer: &str) {
        let libraries: &[&str] = match sanitizer {
            "" => return,
            "address" => {
                build.flags(["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]);
                &["asan", "ubsan"]
            }
            "thread" => {
                build.define("CUEMU_TSAN", None);
                &["tsan"]
            }
            other => panic!("{SANITIZER} is address or thread, not {other}"),
        };
        build.opt_level(1).flag("-fno-omit-frame-pointer");
        for library in libraries {
            println!("cargo::rustc-link-lib=dylib={library}");
        }
        println!("cargo::rustc-cfg=emulator_sanitized");
    }

    /// What becomes one object: the emulator's machine, or a kernel file at one precision.
    struct Unit {
        source: PathBuf,
        /// Everything the object is made of beside the shared headers.
        text: String,
        machine: bool,
    }

    /// Objects are kept under a hash of all they are made of: a change of one kernel compiles one kernel.
    fn compile(build: &cc::Build, units: &[Unit], out: &Path, shared: &str) -> Vec<PathBuf> {
        let object = |unit: &Unit| {
            let mut hash = DefaultHasher::new();
            (shared, include_str!("build.rs"), &unit.text, env::var("RUSTC").ok()).hash(&mut hash);
            let stem = unit.source.file_stem().and_then(|s| s.to_str()).expect("plain names");
            out.join(format!("{stem}-{:016x}.o", hash.finish()))
        };
        for machine in [true, false] {
            let missing: Vec<&Unit> =
                units.iter().filter(|unit| unit.machine == machine && !object(unit).exists()).collect();
            if missing.is_empty() {
                continue;
            }
            let mut build = build.clone();
            match (machine, env::var(SANITIZER).as_deref()) {
                (true, Err(_) | Ok("")) => _ = build.opt_level(3),
                (false, Ok("thread")) => _ = build.flag("-fsanitize=thread"),
                _ => (),
            }
            let made = build.files(missing.iter().map(|unit| &unit.source)).compile_intermediates();
            for (made, unit) in made.iter().zip(missing) {
                fs::rename(made, object(unit)).expect("OUT_DIR is writable");
            }
        }
        units.iter().map(object).collect()
    }

    fn read(path: &Path) -> String {
        fs::read_to_string(path).expect("sources are text")
    }

    /// One kernel file at one precision, in a namespace without a name: templates of the two precisions share theirs.
    fn translation_unit(out: &Path, kernel: &Path, bits: u32) -> (PathBuf, String) {
        let stem = kernel.file_stem().and_then(|s| s.to_str()).expect("kernels have plain names");
        let path = out.join(format!("{stem}_f{bits}.cpp"));
        let text = format!(
            "#define ELEM {bits}\n#include \"ptx.cuh\"\nnamespace {{\n#include \"{}\"\n}}\n",
            kernel.display()
        );
        if fs::read_to_string(&path).ok().as_deref() != Some(text.as_str()) {
            fs::write(&path, &text).expect("OUT_DIR is writable");
        }
        (path, text)
    }
}
