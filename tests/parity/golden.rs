//! Opens a folder of goldens: files, tensors and parameters as the folder itself names them.
//!
//! Nothing here knows a case, a shape or a seed. `index.json` describes the safetensors files; a file that it does
//! not list is still opened, with no parameters and no inputs.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::Value;

use crate::Outcome;
use crate::tensor::{Dtype, Tensor};

/// The folder.
pub struct Golden {
    /// Where it lies.
    pub dir: PathBuf,
    /// Its safetensors files, sorted by name.
    pub files: Vec<File>,
}

/// One safetensors file.
pub struct File {
    /// Path below the folder, without `.safetensors`: `prep_<case>`, `convergence/<run>_e2e/e2e`.
    pub name: String,
    /// `params` of index.json: the hash seed, network, loss, optimizer and hash inputs.
    pub params: Value,
    /// What index.json says about the whole file.
    pub text: String,
    /// What it says about single tensors.
    about: BTreeMap<String, String>,
    /// Name patterns of tensors that are given.
    inputs: Vec<String>,
    bytes: Vec<u8>,
    tensors: BTreeMap<String, (Dtype, Vec<usize>, Range<usize>)>,
}

impl Golden {
    /// Reads index.json and every safetensors file below `dir`.
    pub fn open(dir: &Path) -> Outcome<Self> {
        let index_path = dir.join("index.json");
        let index = match std::fs::read(&index_path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map_err(|e| format!("{}: {e}", index_path.display()))?
            }
            Err(_) => Value::Null,
        };
        let pattern = format!("{}/**/*.safetensors", glob::Pattern::escape(&dir.to_string_lossy()));
        let mut files = Vec::new();
        for path in glob::glob(&pattern)? {
            let path = path?;
            let relative = path.strip_prefix(dir)?.to_string_lossy().replace('\\', "/");
            let name = relative.trim_end_matches(".safetensors").to_owned();
            files.push(File::open(&path, name, &index[&relative])?);
        }
        files.sort_by(|a, b| a.name.cmp(&b.name));
        let missing =
            index.as_object().into_iter().flatten().map(|(name, _)| name.trim_end_matches(".safetensors"));
        for name in missing.filter(|name| files.iter().all(|f| f.name != *name)) {
            println!("skipped: {name}: in index.json but not in the folder");
        }
        Ok(Golden { dir: dir.to_owned(), files })
    }

    /// The file of exactly this name.
    pub fn file(&self, name: &str) -> Option<&File> {
        self.files.iter().find(|f| f.name == name)
    }

    /// The files whose name fits the pattern (`prep_*`).
    pub fn files(&self, pattern: &str) -> impl Iterator<Item = &File> {
        self.files.iter().filter(move |f| fits(pattern, &f.name))
    }
}

impl File {
    fn open(path: &Path, name: String, index: &Value) -> Outcome<Self> {
        let bytes = std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let (header, metadata) =
            SafeTensors::read_metadata(&bytes).map_err(|e| format!("{}: {e}", path.display()))?;
        let start = header + 8; // the header's length precedes it as one u64
        let tensors = metadata.tensors().into_iter().map(|(name, info)| {
            let (from, to) = info.data_offsets;
            (name, (info.dtype, info.shape.clone(), start + from..start + to))
        });
        let tensors = tensors.collect();
        let inputs = index["inputs"].as_array().into_iter().flatten();
        let inputs = inputs.filter_map(|v| v.as_str().map(str::to_owned)).collect();
        let text = index["text"].as_str().unwrap_or_default().to_owned();
        let about = index["tensors"].as_object().into_iter().flatten();
        let about = about.map(|(n, v)| (n.clone(), v[2].as_str().unwrap_or_default().to_owned())).collect();
        Ok(File { name, params: index["params"].clone(), text, about, inputs, bytes, tensors })
    }

    /// The stored tensor of exactly this name (`NAME`, `NAME#digest` or `NAME#samples`).
    pub fn tensor(&self, name: &str) -> Option<Tensor> {
        let (dtype, shape, range) = self.tensors.get(name)?;
        Tensor::decode(*dtype, shape, &self.bytes[range.clone()]).ok()
    }

    /// The same, where a group cannot go on without it.
    pub fn need(&self, name: &str) -> Outcome<Tensor> {
        self.tensor(name).ok_or_else(|| format!("{}: there is no readable tensor {name}", self.name).into())
    }

    /// The type of a whole stored tensor.
    pub fn dtype(&self, name: &str) -> Option<Dtype> {
        self.tensors.get(name).map(|t| t.0)
    }

    /// What index.json says about a tensor, in whatever form it is stored.
    pub fn about(&self, base: &str) -> &str {
        let forms = ["", "#digest", "#samples"].map(|form| format!("{base}{form}"));
        forms
            .iter()
            .filter_map(|f| self.about.get(f))
            .map(String::as_str)
            .find(|t| !t.is_empty())
            .unwrap_or_default()
    }

    /// Names without `#digest` and `#samples`, each once, sorted.
    pub fn base_names(&self) -> BTreeSet<&str> {
        self.tensors.keys().map(|n| n.split_once('#').map_or(n.as_str(), |(base, _)| base)).collect()
    }

    /// The `CASE` of every tensor `CASE<suffix>`: `stems(".pred")`.
    pub fn stems<'a>(&'a self, suffix: &'a str) -> impl Iterator<Item = &'a str> {
        self.base_names().into_iter().filter_map(move |n| n.strip_suffix(suffix))
    }

    /// Whether index.json calls this tensor given.
    pub fn is_input(&self, base: &str) -> bool {
        self.inputs.iter().any(|p| fits(p, base))
    }

    /// The folder's hash seed.
    pub fn seed(&self) -> Outcome<u64> {
        self.params["seed"].as_u64().ok_or_else(|| format!("{}: index.json has no seed", self.name).into())
    }
}

/// The numbers of the bracket that follows `marker` in a description: `numbers("pixdim=(1.5,2)", "pixdim=")`.
pub fn numbers(text: &str, marker: &str) -> Option<Vec<f64>> {
    let list = text.split_once(marker)?.1.trim_start().strip_prefix('(')?.split_once(')')?.0;
    Some(list.split(',').map_while(|n| n.trim().parse().ok()).collect())
}

/// Whether `name` fits a pattern of index.json: `*` and `<anything>` stand for any characters, also none.
pub fn fits(pattern: &str, name: &str) -> bool {
    let mut plain = String::new();
    let mut depth = 0;
    for c in pattern.chars() {
        match c {
            '<' => depth += 1,
            '>' if depth > 0 => {
                depth -= 1;
                plain.push('*');
            }
            c if depth == 0 => plain.push(c),
            _ => {}
        }
    }
    let parts: Vec<&str> = plain.split('*').collect();
    let [first, middle @ .., last] = parts.as_slice() else { return plain == name };
    let Some(mut rest) = name.strip_prefix(first) else { return false };
    for part in middle {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}
