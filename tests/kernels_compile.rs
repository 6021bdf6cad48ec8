//! Every kernel file, at both precisions, compiled by the real NVRTC: no GPU is needed for that. No entry may spill
//! registers, use a stack or have static shared memory. `SPLEEN_ARCHS=sm_80,sm_90a` or `all` says for which chips.

mod skip;

use spleen_hpc::device::cuda::Precision;
use spleen_hpc::device::cuda::kernel_cache::in_parallel;
use spleen_hpc::device::cuda::nvrtc::{Entry, Nvrtc, Target};
use spleen_hpc::device::cuda::sources::{self, Source};
use std::path::Path;
use std::process::Command;

/// Every kind of chip the kernels are for.
const ALL: [&str; 6] = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a"];
const PRECISIONS: [Precision; 2] = [Precision::Half, Precision::Single];

fn targets() -> Vec<Target> {
    let asked = std::env::var("SPLEEN_ARCHS").unwrap_or_else(|_| "sm_80,sm_90a".into());
    let list = if asked == "all" { ALL.join(",") } else { asked };
    list.split(',').map(Target::named).collect()
}

#[test]
fn every_kernel_compiles_without_spills() {
    let Some(nvrtc) = skip::nvrtc() else { return };
    let mut jobs = Vec::new();
    for source in sources::all() {
        for precision in PRECISIONS {
            jobs.extend(targets().into_iter().map(|target| (source, precision, target)));
        }
    }
    assert!(!jobs.is_empty(), "no kernel is embedded");
    let begun = std::time::Instant::now();
    let modules = in_parallel(&jobs, |(source, precision, target)| nvrtc.compile(source, *precision, target));
    println!("{} modules in {:.1} s", jobs.len(), begun.elapsed().as_secs_f64());
    println!(
        "{:<40} {:>9} {:>9} {:>6} {:>9} {:>6}",
        "entry", "target", "registers", "stack", "spills", "shared"
    );
    let mut wrong = Vec::new();
    for ((source, _, target), module) in jobs.iter().zip(modules) {
        let entries = match module {
            Ok(module) => module.entries,
            Err(err) => {
                wrong.push(err.to_string());
                continue;
            }
        };
        if entries.is_empty() {
            wrong.push(format!("{} has no entry for {target}", source.file));
        }
        for Entry { name, registers, stack, spill_stores, spill_loads, shared } in entries {
            let spills = format!("{spill_stores}/{spill_loads}");
            println!("{name:<40} {target:>9} {registers:>9} {stack:>6} {spills:>9} {shared:>6}");
            if stack + spill_stores + spill_loads + shared > 0 {
                wrong.push(format!(
                    "{name} for {target}: {stack} bytes of stack, {spills} of spills, {shared} of static shared memory"
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// PTX for chips that this NVRTC does not know.
#[test]
fn every_kernel_has_a_fallback() {
    let Some(nvrtc) = skip::nvrtc() else { return };
    let ptx = Target::named("compute_80");
    for source in sources::all() {
        let module = nvrtc.compile(&source, Precision::Half, &ptx).unwrap_or_else(|err| panic!("{err}"));
        let text = String::from_utf8_lossy(&module.image);
        assert!(text.contains(".target sm_80") && text.ends_with('\0'), "{}", source.file);
    }
}

/// The instructions that the speed comes from are in the machine code, and a kernel that keeps too much in registers
/// is seen to spill: were the report not read, the test above would pass for nothing.
#[test]
fn machine_code_has_what_ptx_asked_for() {
    let Some(nvrtc) = skip::nvrtc() else { return };
    let text = r#"
#include "ptx.cuh"
struct Args { In<h16> a, b; Out<float> y; u64 unused; };
KERNEL(probe, Args, 32) {
  SHARED(tile);
  u32 lane = threadIdx.x;
  cp_async_16(tile + lane * 16, args.a, lane * 8, true);
  cp_async_16(tile + 512 + lane * 16, args.b, lane * 8, true);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  u32 a[4], b[4];
  ldmatrix_x4(a, tile + lane * 16);
  ldmatrix_x4_trans(b, tile + 512 + lane * 16);
  float d[4] = {};
  mma_m16n8k16(d, a, b[0], b[1]);
  for (int i = 0; i < 4; i++) args.y.set(lane * 4 + i, d[i]);
}
KERNEL(spilling, Args, 1024) {
  float v[128];
  for (int i = 0; i < 128; i++) v[i] = to_f32(args.a[i * 1024 + threadIdx.x]);
  for (int j = 0; j < 128; j++) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 128; i++) sum += v[i] * to_f32(args.b[j * 128 + i]);
    args.y.set(j * 1024 + threadIdx.x, sum);
  }
}
"#;
    let headers = sources::all().next().expect("a kernel").headers;
    let source = Source { file: "probe.cu", text, headers };
    for target in targets() {
        let module = nvrtc.compile(&source, Precision::Half, &target).unwrap_or_else(|err| panic!("{err}"));
        let [probe, spilling] = &module.entries[..] else { panic!("{:?}", module.entries) };
        assert_eq!((probe.name.as_str(), spilling.name.as_str()), ("probe_f16", "spilling_f16"));
        assert!(probe.registers > 8 && probe.stack == 0, "{probe:?}");
        assert!(spilling.stack > 0 && spilling.spill_loads > 0, "{spilling:?}");
        let Some(sass) = disassemble(nvrtc, &module.image) else { return };
        for instruction in ["HMMA.16816.F32", "LDSM.16.M88.4", "LDSM.16.MT88.4", "LDGSTS.E", "LDGDEPBAR"] {
            assert!(sass.contains(instruction), "{target}: no {instruction} in\n{sass}");
        }
    }
}

/// What NVIDIA's disassembler makes of a cubin, where it lies beside NVRTC or on the path.
fn disassemble(nvrtc: &Nvrtc, cubin: &[u8]) -> Option<String> {
    let beside = nvrtc.path().parent().and_then(Path::parent).map(|root| root.join("bin/cuobjdump"));
    let program = beside.filter(|path| path.exists()).unwrap_or("cuobjdump".into());
    let file = tempfile::Builder::new().suffix(".cubin").tempfile().expect("a temporary file");
    std::fs::write(file.path(), cubin).expect("a temporary file");
    match Command::new(program).arg("-sass").arg(file.path()).output() {
        Ok(out) if out.status.success() => Some(String::from_utf8_lossy(&out.stdout).into_owned()),
        _ => {
            println!("skipped: no cuobjdump to read the machine code with");
            None
        }
    }
}

/// With `SPLEEN_REQUIRE_NVRTC=1` nothing of the proof without a GPU may be left out.
#[test]
fn the_emulator_is_built_where_it_is_required() {
    assert!(cfg!(emulated) || !skip::required(), "no C++ compiler built the emulator");
}
