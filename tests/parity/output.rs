//! `SPLEEN_PARITY_OUT`: every recomputed tensor, whole, for anyone to compare with other tools.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, TensorView};

use crate::Outcome;
use crate::ledger::{LeftOut, Row};
use crate::tensor::Tensor;

type Stored = (Dtype, Vec<usize>, Vec<u8>);

/// The output folder, or nothing when none is asked for.
pub struct Output {
    dir: Option<PathBuf>,
    files: BTreeMap<String, BTreeMap<String, Stored>>,
}

impl Output {
    pub fn new(dir: Option<PathBuf>) -> Self {
        Output { dir, files: BTreeMap::new() }
    }

    /// Keeps a tensor until [`Output::write_files`].
    pub fn keep(&mut self, file: &str, name: &str, tensor: &Tensor, dtype: Dtype) {
        if self.dir.is_some() {
            let (dtype, bytes) = tensor.encode(dtype);
            let stored = (dtype, tensor.shape.clone(), bytes);
            self.files.entry(file.to_owned()).or_default().insert(name.to_owned(), stored);
        }
    }

    /// Where to write a file that lies at `relative` in the golden folder; its folder exists afterwards.
    pub fn path(&self, relative: &str) -> Outcome<Option<PathBuf>> {
        let Some(dir) = &self.dir else { return Ok(None) };
        let path = dir.join(relative);
        std::fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
        Ok(Some(path))
    }

    /// Writes and forgets what was kept: called after each group, so that one group's tensors are in memory.
    pub fn write_files(&mut self) -> Outcome<()> {
        for (file, tensors) in std::mem::take(&mut self.files) {
            let Some(path) = self.path(&format!("{file}.safetensors"))? else { return Ok(()) };
            let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
                Ok((name, TensorView::new(*dtype, shape.clone(), bytes)?))
            });
            let views = views.collect::<Outcome<Vec<_>>>()?;
            safetensors::serialize_to_file(views, None, &path)?;
        }
        Ok(())
    }

    /// `not_recomputed.txt`: one line a tensor, with the reason; what failed before it could be compared, too.
    pub fn write_left_out(&self, left_out: &[LeftOut], rows: &[Row]) -> Outcome<()> {
        let Some(path) = self.path("not_recomputed.txt")? else { return Ok(()) };
        let excused = left_out.iter().map(|l| format!("{}: {}: {}\n", l.file, l.name, l.reason));
        let failed =
            rows.iter().filter_map(|r| r.worst.as_ref().err().map(|why| format!("{}: {why}\n", r.what)));
        Ok(std::fs::write(path, excused.chain(failed).collect::<String>())?)
    }
}
