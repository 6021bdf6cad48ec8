//! The lists that the bundle would make, and a clear sentence where there is none.

use std::fs;
use std::path::Path;

use spleen_hpc::data::dataset::{Split, expand_inputs, training_cases};

/// The 41 labelled cases of MSD Task09.
const MSD: [u32; 41] = [
    2, 3, 6, 8, 9, 10, 12, 13, 14, 16, 17, 18, 19, 20, 21, 22, 24, 25, 26, 27, 28, 29, 31, 32, 33, 38, 40,
    41, 44, 45, 46, 47, 49, 52, 53, 56, 59, 60, 61, 62, 63,
];

fn touch(path: impl AsRef<Path>) {
    fs::create_dir_all(path.as_ref().parent().unwrap()).unwrap();
    fs::write(path, b"").unwrap();
}

fn names(cases: &[spleen_hpc::data::dataset::Case]) -> Vec<&str> {
    cases.iter().map(|c| c.name.as_str()).collect()
}

#[test]
fn msd_splits_as_the_bundle_does() {
    let dir = tempfile::tempdir().unwrap();
    for n in MSD {
        for folder in ["imagesTr", "labelsTr"] {
            touch(dir.path().join(format!("{folder}/spleen_{n}.nii.gz")));
            // The shadows of a Mac's archive.
            touch(dir.path().join(format!("{folder}/._spleen_{n}.nii.gz")));
        }
    }
    touch(dir.path().join("imagesTs/spleen_1.nii.gz"));
    touch(dir.path().join("imagesTs/._spleen_1.nii.gz"));
    let cases = training_cases(dir.path()).unwrap();
    assert_eq!(cases.len(), 41);
    let (train, val) = Split::Last(None).apply(cases.len()).unwrap();
    assert_eq!(train.len(), 32);
    // numerics of the bundle: sorted as text, the last nine.
    let val: Vec<_> = val.iter().map(|&i| cases[i].name.trim_start_matches("spleen_")).collect();
    assert_eq!(val, ["56", "59", "6", "60", "61", "62", "63", "8", "9"]);
    assert!(cases.iter().all(|c| c.label == c.image.to_string_lossy().replace("images", "labels")));
}

#[test]
fn splits_are_partitions() {
    for n in 1..60 {
        let (train, val) = Split::Last(None).apply(n).unwrap();
        assert_eq!([&train[..], &val[..]].concat(), (0..n).collect::<Vec<_>>());
        assert!(!train.is_empty() && val.len() <= 9 && (n == 1 || !val.is_empty()));
        for folds in 2..=n.min(6) {
            let mut validated = Vec::new();
            for fold in 0..folds {
                let (train, val) = Split::Fold { folds, fold }.apply(n).unwrap();
                let mut all = [&train[..], &val[..]].concat();
                all.sort();
                assert_eq!(all, (0..n).collect::<Vec<_>>());
                assert!(val.iter().all(|i| i % folds == fold) && !val.is_empty());
                validated.extend(val);
            }
            validated.sort();
            assert_eq!(validated, (0..n).collect::<Vec<_>>(), "every case validates in one fold");
        }
    }
    assert_eq!(Split::Last(None).apply(16).unwrap().1, [12, 13, 14, 15]);
    assert_eq!(Split::Last(Some(0)).apply(2).unwrap().0, [0, 1]);
    for bad in [Split::Last(Some(2)), Split::Fold { folds: 2, fold: 2 }, Split::Fold { folds: 3, fold: 0 }] {
        let e = bad.apply(2).unwrap_err();
        assert_eq!(e.exit_code(), 2, "{e}");
    }
}

#[test]
fn dataset_json_is_used_where_there_are_no_folders() {
    let dir = tempfile::tempdir().unwrap();
    for file in ["ct/b.nii.gz", "ct/a.nii", "seg/b.nii.gz", "seg/a.nii", "new/t.nii.gz"] {
        touch(dir.path().join(file));
    }
    let listed = dir.path().join("dataset.json");
    let json = r#"{"training": [{"image": "./ct/b.nii.gz", "label": "./seg/b.nii.gz"},
                    {"image": "ct/a.nii", "label": "seg/a.nii"}], "test": ["./new/t.nii.gz"], "licence": "x"}"#;
    fs::write(&listed, json).unwrap();
    let cases = training_cases(dir.path()).unwrap();
    assert_eq!(names(&cases), ["a", "b"]);
    assert_eq!(cases[1].image, dir.path().join("ct/b.nii.gz"));
    fs::remove_file(dir.path().join("seg/a.nii")).unwrap();
    let e = training_cases(dir.path()).unwrap_err().to_string();
    assert!(e.contains("dataset.json") && e.contains("seg/a.nii"), "{e}");
    for text in ["", "[1]", "{\"training\": 3}", "\u{0}", "{\"training\": []}"] {
        fs::write(&listed, text).unwrap();
        let e = training_cases(dir.path()).unwrap_err();
        assert!(e.to_string().contains("dataset.json") && e.exit_code() == 2, "{e}");
    }
}

#[test]
fn what_does_not_pair_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let refused = |part: &str| {
        let e = training_cases(dir.path()).unwrap_err().to_string();
        assert!(e.contains(part), "{e}");
    };
    refused("imagesTr");
    touch(at("imagesTr/a.nii.gz"));
    refused("imagesTr/a.nii.gz: has no label");
    touch(at("labelsTr/a.nii"));
    assert_eq!(names(&training_cases(dir.path()).unwrap()), ["a"]);
    touch(at("labelsTr/b.nii.gz"));
    refused("labelsTr/b.nii.gz: labels no image");
    touch(at("imagesTr/b.nii.gz"));
    touch(at("imagesTr/b.nii"));
    refused("same case");
    let e = training_cases(at("nowhere")).unwrap_err().to_string();
    assert!(e.contains("nowhere: is not a folder"), "{e}");
}

#[test]
fn inputs_are_files_folders_and_globs() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    for file in [
        "x/b.nii.gz",
        "x/a.nii",
        "x/._a.nii",
        "x/notes.txt",
        "x/p.hdr",
        "x/p.img",
        "y/c.nii.gz",
        "odd[1].nii",
    ] {
        touch(at(file));
    }
    fs::create_dir(at("empty")).unwrap();
    let paths = |inputs: &[&str]| -> Vec<String> {
        let inputs: Vec<String> = inputs.iter().map(|i| at(i)).collect();
        expand_inputs(&inputs).unwrap().iter().map(|p| p.display().to_string()).collect()
    };
    let all = ["x/a.nii", "x/b.nii.gz", "x/p.hdr"].map(at);
    assert_eq!(paths(&["x"]), all);
    assert_eq!(paths(&["x/*", "x/b.nii.gz", "x/./b.nii.gz"]), all);
    assert_eq!(paths(&["?/*.nii.gz"]), ["x/b.nii.gz", "y/c.nii.gz"].map(at));
    assert_eq!(
        paths(&["y", "x/notes.txt"]),
        ["x/notes.txt", "y/c.nii.gz"].map(at),
        "a named file is believed"
    );
    assert_eq!(paths(&["odd[1].nii"]), [at("odd[1].nii")], "a file's own name is no pattern");
    for (input, part) in [
        ("none.nii", "does not exist"),
        ("x/*.mha", "matches no volume"),
        ("empty", "holds no volume"),
        ("[", "glob"),
    ] {
        let e = expand_inputs(&[at(input)]).unwrap_err();
        assert!(e.to_string().contains(part) && e.exit_code() == 2, "{e}");
    }
}
