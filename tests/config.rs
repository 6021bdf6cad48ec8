//! Recipes against the published tables, precedence of the layers, and the resolved file read back.

use std::path::Path;

use clap::{CommandFactory, FromArgMatches, Parser};
use spleen_hpc::config::*;

/// The flags alone, as every verb has them.
#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    overrides: Overrides,
}

fn flags(args: &[&str]) -> Overrides {
    let matches = Flags::command().try_get_matches_from([&["test"], args].concat()).expect("good flags");
    Flags::from_arg_matches(&matches).expect("good flags").overrides
}

fn file(text: &str) -> spleen_hpc::Result<Overrides> {
    Overrides::from_toml(text, Path::new("run.toml"))
}

/// The table of numerics.md 0.1 and the numbers of 1.
#[test]
fn recipes_have_the_published_numbers() {
    let old = Config::for_recipe(Recipe::V036);
    let optim =
        |optimizer, lr, beta2| Optim { optimizer, lr, beta1: 0.9, beta2, eps: 1e-8, weight_decay: 0.0 };
    assert_eq!(old.optim, optim(Optimizer::Adam, 1e-4, 0.999));
    assert_eq!((old.loss.lambda_dice, old.loss.lambda_ce, old.loss.smooth), (1.0, 1.0, 1e-5));
    assert!(old.loss.include_background && old.loss.squared_pred && old.loss.batch);
    assert_eq!((old.run.epochs, old.run.val_interval, old.run.val_cases), (100, 5, None));
    assert_eq!(old.seed, 123);
    assert_eq!(old.preprocess.spacing_mm, [1.5, 1.5, 2.0]);
    assert_eq!(old.preprocess.hu_window, [-57.0, 164.0]);
    assert!(!old.preprocess.crop_foreground);
    assert_eq!(old.sampling.patch, [96; 3]);
    assert_eq!((old.sampling.pos, old.sampling.neg, old.sampling.shift_offset), (1.0, 1.0, 0.0));
    assert_eq!((old.sampling.samples_per_volume, old.sampling.volumes_per_step), (4, 2));
    assert_eq!(old.net, Net { norm: Norm::Batch, channels: vec![16, 32, 64, 128, 256] });
    assert_eq!(old.window, Window { roi: [96; 3], overlap: 0.5, batch: 4, blend: Blend::Constant });

    let new = Config::for_recipe(Recipe::V059);
    assert_eq!(new.optim, optim(Optimizer::Novograd, 2e-3, 0.98));
    assert_eq!((new.loss.lambda_dice, new.loss.lambda_ce), (0.5, 0.5));
    assert_eq!((new.run.epochs, new.run.val_interval), (800, 1));
    assert_eq!((&new.preprocess, &new.sampling, &new.net), (&old.preprocess, &old.sampling, &old.net));

    let seed = Config::for_recipe(Recipe::Seed);
    assert!(seed.preprocess.crop_foreground);
    assert_eq!((seed.sampling.shift_offset, seed.sampling.shift_prob), (0.1, 0.5));
    assert_eq!((seed.run.epochs, seed.optim, seed.loss), (1260, old.optim, old.loss));
    assert_eq!(Config::resolve(&[]).unwrap(), seed, "seed is the default");
}

#[test]
fn flags_win_over_the_file_and_the_file_over_the_recipe() {
    let toml = file("recipe = \"0.3.6\"\nlr = 0.5\nepochs = 7\npatch = 32\nroi = [16, 32, 48]").unwrap();
    let config = Config::resolve(&[&toml, &flags(&["--epochs", "9"])]).unwrap();
    assert_eq!(config.recipe, Recipe::V036);
    assert_eq!((config.optim.lr, config.run.epochs, config.run.val_interval), (0.5, 9, 5));
    assert_eq!((config.sampling.patch, config.window.roi), ([32; 3], [16, 32, 48]));

    // A recipe named by a flag changes the defaults below the file, not the file.
    let config = Config::resolve(&[&toml, &flags(&["--recipe", "0.5.9"])]).unwrap();
    assert_eq!((config.optim.lr, config.run.epochs), (0.5, 7));
    assert_eq!((config.optim.optimizer, config.run.val_interval), (Optimizer::Novograd, 1));
}

#[test]
fn one_number_or_three() {
    assert_eq!(flags(&["--patch", "64"]).patch, Some([64; 3]));
    assert_eq!(flags(&["--patch", "64,32,16"]).patch, Some([64, 32, 16]));
    assert_eq!(flags(&["--spacing", "1.5,1.5,2.0"]).spacing, Some([1.5, 1.5, 2.0]));
    assert_eq!(flags(&["--hu-window", "-57,164"]).hu_window, Some([-57.0, 164.0]));
    assert_eq!(flags(&["--channels", "4,6,8"]).channels, Some(vec![4, 6, 8]));
    assert_eq!(flags(&["--crop-foreground", "false"]).crop_foreground, Some(false));
    assert_eq!(flags(&["--device", "cuda:3"]).device, Some(DeviceChoice::Cuda(3)));
    for bad in ["64,32", "x", "", "1,2,3,4"] {
        assert!(Flags::command().try_get_matches_from(["test", "--patch", bad]).is_err(), "{bad}");
    }
}

/// What is saved with a result makes the same run again, whichever way each number was given.
#[test]
fn the_resolved_file_reproduces_the_config() {
    for recipe in ["seed", "0.3.6", "0.5.9"] {
        let given = flags(&[
            "--recipe",
            recipe,
            "--label-value",
            "3",
            "--folds",
            "5",
            "--fold",
            "2",
            "--spacing",
            "0.7,0.8,3",
            "--shift-offset",
            "0.15",
            "--device",
            "cpu",
            "--amp",
            "off",
            "--lr",
            "0.00031",
        ]);
        let config = Config::resolve(&[&given]).unwrap();
        let again = Config::resolve(&[&file(&config.to_toml()).unwrap()]).unwrap();
        assert_eq!(config, again);
        assert_eq!(config.to_toml(), again.to_toml());
        let json = Overrides::of(&config).to_json();
        let again = Overrides::from_json(json, Path::new("checkpoint")).unwrap();
        assert_eq!(config, Config::resolve(&[&again]).unwrap());

        let record = config.record();
        for place in ["data", "device", "amp", "threads"] {
            assert!(record.get(place).is_none(), "{place} says where, not what");
        }
        let here = Overrides::from_json(record, Path::new("checkpoint")).unwrap();
        let given = Overrides {
            data: config.run.data.clone(),
            device: Some(config.device),
            amp: Some(config.amp),
            ..here
        };
        assert_eq!(config, Config::resolve(&[&given]).unwrap());
    }
}

/// The keys of the file are the names of the flags: none is missing on either side.
#[test]
fn keys_are_flags() {
    let everything = flags(&["--label-value", "1", "--folds", "2", "--val-cases", "1", "--data", "d"]);
    let keys: toml::Table = Config::resolve(&[&everything]).unwrap().to_toml().parse().unwrap();
    let mut keys: Vec<String> = keys.keys().cloned().collect();
    let command = Flags::command();
    let mut longs: Vec<String> =
        command.get_arguments().filter_map(|a| a.get_long()).map(String::from).collect();
    keys.sort();
    longs.sort();
    assert_eq!(keys, longs);
}

#[test]
fn a_bad_file_names_line_and_key() {
    let says = |text: &str| file(text).unwrap_err().to_string();
    assert_eq!(
        says("lr = 1e-3\nlearning-rate = 1"),
        "run.toml: line 2: unknown key `learning-rate`; `spleen-hpc train --help` lists the keys"
    );
    assert!(says("epochs = \"many\"").starts_with("run.toml: line 1: invalid type: string \"many\""));
    assert!(
        says("\npatch = [1, 2]").starts_with("run.toml: line 2: expected one number or an array of three")
    );
    assert!(says("lr =").starts_with("run.toml: line 1: "));
    assert!(says("optimizer = \"sgd\"").contains("unknown variant `sgd`, expected `adam` or `novograd`"));
}

/// Each line: flags that cannot be, and what the refusal must name.
#[test]
fn nonsense_is_refused_by_name() {
    for (args, part) in [
        (
            &["--patch", "90"][..],
            "--patch must be multiples of 16 for a network of 5 levels, but is [90, 90, 90]",
        ),
        (&["--roi", "96,96,0"], "--roi must be multiples of 16"),
        (
            &["--channels", "4,8,12", "--patch", "6"],
            "--patch must be multiples of 4 for a network of 3 levels",
        ),
        (&["--overlap", "1"], "--overlap must be at least 0 and below 1, but is 1"),
        (&["--sw-batch", "0"], "--sw-batch must be at least 1"),
        (&["--epochs", "0"], "--epochs must be at least 1"),
        (&["--pos", "0", "--neg", "0"], "--pos and --neg"),
        (&["--lambda-dice", "0", "--lambda-ce", "0"], "--lambda-dice and --lambda-ce"),
        (&["--lr", "nan"], "--lr must be at least 0, but is NaN"),
        (&["--beta2", "1"], "--beta2"),
        (&["--spacing", "0"], "--spacing must be above 0 mm"),
        (&["--hu-window", "164,-57"], "--hu-window must go from a lower to a higher HU, but is 164,-57"),
        (&["--folds", "5", "--fold", "5"], "--fold counts from 0 to 4 with --folds 5, but is 5"),
        (&["--fold", "1"], "--fold 1 needs --folds"),
        (&["--norm", "instance", "--patch", "16"], "--patch [16, 16, 16] leaves one value"),
        (&["--channels", "4"], "--channels must be 2 to 8 levels"),
        (&["--label-value", "0"], "--label-value"),
        (&["--seed", "18446744073709551615"], "--seed must be below 2^63"),
    ] {
        let err = Config::resolve(&[&flags(args)]).expect_err("nonsense");
        assert!(err.to_string().contains(part), "{args:?}: {err}");
        assert_eq!(err.exit_code(), 2);
    }
}
