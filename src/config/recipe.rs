//! The numbers of the published recipes (model-zoo `spleen_ct_segmentation`, bundle versions 0.3.6 and 0.5.9).

use super::*;

impl Config {
    /// The recipe's numbers, none overridden.
    ///
    /// Bundle 0.3.6 is the trunk; 0.5.9 changed the optimizer, the weights of the loss and the length. `seed` is
    /// what the README of 0.3.6 describes and its config never had: the foreground crop and the intensity shift of
    /// the Clara recipe it came from, and 1260 epochs.
    pub fn for_recipe(recipe: Recipe) -> Config {
        let trunk = Config {
            recipe,
            seed: 123,
            device: DeviceChoice::Auto,
            amp: Amp::Auto,
            threads: 0,
            preprocess: Preprocess {
                spacing_mm: [1.5, 1.5, 2.0],
                hu_window: [-57.0, 164.0],
                crop_foreground: false,
            },
            sampling: Sampling {
                patch: [96; 3],
                pos: 1.0,
                neg: 1.0,
                samples_per_volume: 4,
                volumes_per_step: 2,
                shift_offset: 0.0,
                shift_prob: 0.0,
            },
            net: Net { norm: Norm::Batch, channels: vec![16, 32, 64, 128, 256] },
            loss: Loss {
                lambda_dice: 1.0,
                lambda_ce: 1.0,
                include_background: true,
                squared_pred: true,
                batch: true,
                smooth: 1e-5,
            },
            optim: Optim {
                optimizer: Optimizer::Adam,
                lr: 1e-4,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                weight_decay: 0.0,
            },
            window: Window { roi: [96; 3], overlap: 0.5, batch: 4, blend: Blend::Constant },
            run: Run {
                data: None,
                epochs: 100,
                val_interval: 5,
                val_cases: None,
                folds: None,
                fold: 0,
                label_value: None,
                cache_dtype: CacheDtype::F16,
                // The Medical Segmentation Decathlon's tolerance for the spleen.
                nsd_tolerance_mm: 3.0,
            },
        };
        match recipe {
            Recipe::V036 => trunk,
            Recipe::Seed => Config {
                preprocess: Preprocess { crop_foreground: true, ..trunk.preprocess },
                sampling: Sampling { shift_offset: 0.1, shift_prob: 0.5, ..trunk.sampling },
                run: Run { epochs: 1260, ..trunk.run },
                ..trunk
            },
            Recipe::V059 => Config {
                loss: Loss { lambda_dice: 0.5, lambda_ce: 0.5, ..trunk.loss },
                optim: Optim { optimizer: Optimizer::Novograd, lr: 2e-3, beta2: 0.98, ..trunk.optim },
                run: Run { epochs: 800, val_interval: 1, ..trunk.run },
                ..trunk
            },
        }
    }
}
