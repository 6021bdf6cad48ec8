//! The replay checks itself first: the hash numbers against the MANIFEST's vectors, and the ledger against tensors
//! that are right, wrong and missing. A ledger that cannot fail proves nothing.

use crate::Outcome;
use crate::golden::{Golden, fits, numbers};
use crate::hash;
use crate::ledger::Ledger;
use crate::output::Output;
use crate::tensor::{Dtype, Tensor};
use crate::tolerance::{EXACT, Tolerance};

/// Stops the replay at the first thing that does not hold.
pub fn run() -> Outcome<()> {
    vectors();
    patterns();
    strides();
    verdicts()
}

/// Vectors printed in the goldens' MANIFEST.md (they do not depend on a folder).
fn vectors() {
    let name = "model.0.conv.unit0.conv.weight";
    assert_eq!(hash::fnv1a64(name), 0xff7f_5922_3045_5812);
    let first: Vec<f64> = hash::hash_uniform(name, 4, 101).collect();
    assert_eq!(first, [0.3102640110679038, 0.9246237624436024, 0.25656785065911936, -0.21830864768899083]);
    let probe: Vec<f64> = hash::hash_uniform("probe1", 3, 0).collect();
    assert_eq!(probe, [0.9188662178592515, -0.1194966074724062, -0.8934507225003452]);
}

fn patterns() {
    assert!(fits("*.p<k>_init", "adam32.p3_init") && !fits("*.p<k>_init", "adam32.p3_1"));
    assert!(fits("x", "x") && !fits("x", "xx") && fits("init.*", "init.") && !fits("*.w", "w"));
    assert_eq!(numbers("Spacing(pixdim=(1.5,2, 3.0), mode)", "pixdim="), Some(vec![1.5, 2.0, 3.0]));
    assert!(!fits("aba*aba", "aba") && fits("a*b*c", "a1b2b3c"));
}

fn strides() {
    let t = Tensor::new(&[2, 1, 3, 2, 3], &(0..36).collect::<Vec<i64>>());
    let s = t.strided(2);
    assert_eq!(
        (s.shape, s.data),
        (vec![2, 1, 2, 1, 2], [0, 2, 12, 14, 18, 20, 30, 32].map(f64::from).to_vec())
    );
}

/// Writes a folder with one tensor in each form and compares right, slightly wrong and wrong tensors with it.
fn verdicts() -> Outcome<()> {
    let dir = tempfile::tempdir()?;
    let right = hash::hash_tensor("right", &[2, 3, 4, 5], 7, 1.0, 0.0);
    let at: Vec<f64> = hash::samples(&right.data, 10).map(|s| s.1).collect();
    let mut forms = Output::new(Some(dir.path().to_owned()));
    forms.keep("f", "whole", &right, Dtype::F32);
    forms.keep("f", "short#digest", &Tensor::new(&[8], &hash::digest(&right.data)), Dtype::F64);
    forms.keep("f", "few#samples", &Tensor::new(&[10], &at), Dtype::F32);
    forms.keep("f", "empty", &Tensor::new(&[2], &[f64::NAN, f64::INFINITY]), Dtype::F64);
    forms.write_files()?;
    let golden = Golden::open(dir.path())?;
    let file = golden.file("f").ok_or("the file that was just written is missing")?;

    let verdict = |got: &Tensor, name: &str, tolerance| {
        let mut ledger = Ledger::new(Output::new(None));
        ledger.compare(file, name, got, tolerance);
        ledger.rows[0].passed()
    };
    let moved = |by: f64| {
        let mut t = right.clone();
        t.data[36] += by; // flat index 36 is one of the ten samples
        t
    };
    let loose = Tolerance::abs("self check", 1e-3);
    for name in ["whole", "short", "few"] {
        assert!(verdict(&right, name, EXACT), "{name}: an equal tensor must pass");
        assert!(!verdict(&moved(1e-6), name, EXACT), "{name}: exact means exact");
        assert!(!verdict(&moved(2e-3), name, loose), "{name}: beyond its bound");
        assert!(!verdict(&moved(f64::NAN), name, loose), "{name}: NaN where a number is due");
    }
    assert!(verdict(&moved(5e-4), "whole", loose) && verdict(&moved(5e-4), "few", loose));
    assert!(!verdict(&moved(5e-4), "short", loose), "dot products are bound by 1e-5 of the norm");
    assert!(!verdict(&moved(5e-4), "whole", loose.and_mean(1e-6)), "the mean has its own bound");
    assert!(!verdict(&moved(5e-4), "whole", Tolerance::norm("self check", 1e-5)));
    let flat = Tensor { shape: vec![120], ..right.clone() };
    assert!(!verdict(&flat, "whole", loose), "another shape is another tensor");
    assert!(verdict(&Tensor::new(&[2], &[f64::NAN, f64::INFINITY]), "empty", EXACT));
    assert!(!verdict(&Tensor::new(&[2], &[f64::NAN, f64::NEG_INFINITY]), "empty", EXACT));

    let mut ledger = Ledger::new(Output::new(None));
    ledger.compare(file, "whole", &right, EXACT);
    ledger.leave_out(file, "few", "self check");
    ledger.account_for(&golden, &["*"]);
    let open = ledger.rows.iter().filter(|r| !r.passed()).count();
    assert_eq!(open, 2, "outputs that nobody compared or excused are failures");
    Ok(())
}
