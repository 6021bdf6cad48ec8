//! Records the commit the binary is built from; every checkpoint, cache and report carries it. With the feature
//! `emulator` it also compiles the CUDA kernels as C++, to be run on the CPU (tests/emulator).

use std::process::Command;

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
    println!("cargo::rustc-check-cfg=cfg(emulated)");
    #[cfg(feature = "emulator")]
    emulator::build();
}

#[cfg(feature = "emulator")]
mod emulator {
    use std::hash::{DefaultHasher, Hash, Hasher};
    use std::path::{Path, PathBuf};
    use std::{env, fs};

    /// Compiles every kernel twice (fp16 and f32 storage) and the machine that runs them. Without a C++ compiler the
    /// cfg `emulated` stays unset, and tests that need the emulator say that they are skipped.
    pub fn build() {
        println!("cargo::rerun-if-changed=kernels");
        println!("cargo::rerun-if-changed=tests/emulator");
        let x86_linux = env::var("CARGO_CFG_TARGET_ARCH").as_deref() == Ok("x86_64")
            && env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux");
        let mut compiler = cc::Build::new();
        compiler.cpp(true);
        if !x86_linux || compiler.try_get_compiler().is_err() {
            println!("cargo::warning=no C++ compiler for x86-64 Linux: the kernels are not emulated");
            return;
        }
        let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
        let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
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
                let (source, wrapper) = translation_unit(&out, kernel, bits);
                Unit { source, text: wrapper + &text, machine: false }
            }));
        }
        let objects = compile(&build, &units, &out, &shared);
        build.objects(&objects);
        build.cargo_metadata(false);
        build.compile("cuemu");
        println!("cargo::rustc-link-search=native={}", out.display());
        // Whole: kernels are found by the list they enter when the program starts, not by symbols.
        println!("cargo::rustc-link-lib=static:+whole-archive=cuemu");
        println!("cargo::rustc-link-lib=stdc++");
        println!("cargo::rustc-cfg=emulated");
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
            if machine {
                build.opt_level(3);
            }
            let made = build.files(missing.iter().map(|unit| &unit.source)).compile_intermediates();
            for (made, unit) in made.iter().zip(missing) {
                fs::rename(made, object(unit)).expect("OUT_DIR is writable");
            }
        }
        units.iter().map(object).collect()
    }

    fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
        let entries =
            fs::read_dir(folder).expect("a folder of the source").map(|e| e.expect("readable").path());
        let mut list: Vec<_> = entries.filter(|p| p.extension().is_some_and(|e| e == extension)).collect();
        list.sort();
        list
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
