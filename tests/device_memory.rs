//! Device memory: the plan bounds what training takes, and where it does not fit, the error says whose it was.

mod support;

use spleen_hpc::config::{CacheDtype, Config, Net, Norm, Recipe, Sampling};
use spleen_hpc::device::cuda::{Cuda, Precision};
use spleen_hpc::nn::UNet;
use spleen_hpc::train::memory_plan::MemoryPlan;
use spleen_hpc::train::trainer::{Input, Trainer};
use std::sync::Arc;
use support::device;

fn trainer(net: &Net, cuda: &Arc<Cuda>) -> Trainer {
    let config = Config::for_recipe(Recipe::Seed);
    let trainer = Trainer::with_network(UNet::new(net, 1).unwrap(), config.loss, config.optim);
    trainer.on_device(cuda).unwrap()
}

/// Steps as they come, at both places of staged patches, and a recorded one.
fn train(trainer: &mut Trainer, n: usize, side: usize) -> spleen_hpc::Result<()> {
    let voxels = n * side.pow(3);
    let images: Vec<f32> = (0..voxels).map(|i| (i % 17) as f32 / 17.0).collect();
    let labels: Vec<u8> = (0..voxels).map(|i| u8::from(i % 5 == 0)).collect();
    for _ in 0..3 {
        trainer.queue(Input::Patches { images: &images, labels: &labels, shape: [n, side, side, side] })?;
    }
    trainer.take_losses(true).map(drop)
}

/// The plan says "at most", and is no excuse to leave a data set on the host: most of what it counts is used.
#[test]
fn training_takes_no_more_than_planned() {
    let wide = Net { norm: Norm::Batch, channels: vec![16, 32, 64, 128, 256] };
    let thin = Net { norm: Norm::Instance, channels: vec![8, 8] };
    for (net, side, precision) in [(wide, 32, Precision::Half), (thin, 64, Precision::Single)] {
        let Some(cuda) = device(precision, 0) else { return };
        let sampling = Sampling {
            patch: [side; 3],
            samples_per_volume: 2,
            volumes_per_step: 1,
            ..Config::for_recipe(Recipe::Seed).sampling
        };
        let free = || cuda.driver().free_memory().unwrap();
        let before = free();
        let plan = MemoryPlan::new(&net, &sampling, precision, (&[[side; 3]], CacheDtype::F16), before);
        let mut trainer = trainer(&net, &cuda);
        train(&mut trainer, 2, side).unwrap();
        let (used, planned) = (before - free(), plan.network_bytes + plan.activations_bytes);
        println!("{net:?} {precision:?}: {used} bytes of {planned} planned");
        assert!(used <= planned, "{used} bytes, planned {planned}");
        // Gradients are fewer than the three a level that may be; the workspace is one for every network, so these
        // small ones need little of it.
        let workspace = 120 << 20;
        assert!(2 * used + workspace >= planned, "{used} bytes, planned {planned}");
    }
}

/// What does not fit is named: the step, MONAI's name of the module, the op; and the cure.
#[cfg(emulated)]
#[test]
fn what_does_not_fit_is_named() {
    use spleen_hpc::device::cuda::Info;
    use spleen_hpc::device::cuda::emulated::Emulated;
    if support::native() {
        println!("skipped: only an emulated device has little memory");
        return;
    }
    let net = Net { norm: Norm::Batch, channels: vec![4, 8, 16] };
    let info = Info {
        name: "small GPU".into(),
        capability: (8, 0),
        multiprocessors: 4,
        memory: 6 << 20,
        shared_per_block: 99 << 10,
    };
    let cuda = Cuda::new(Arc::new(Emulated::with_info(0, info)), Precision::Half);
    let mut trainer = trainer(&net, &cuda);
    let said = train(&mut trainer, 2, 48).unwrap_err().to_string();
    // 2 x 24^3 x 8 floats of the first convolution and its shortcut fit; somewhere after that it ends.
    assert!(said.starts_with("the GPU has no room for "), "{said}");
    assert!(said.contains(" MiB more, wanted by step, model."), "{said}");
    assert!(said.contains("(") && said.contains("of 6 MiB are free): lower --volumes-per-step"), "{said}");
}
