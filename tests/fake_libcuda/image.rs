//! Cubins and PTX, as far as a launch needs them: which kernels there are, and how large their arguments.

use std::collections::HashMap;
use std::ffi::CStr;

/// A module: bytes of arguments of each kernel.
pub struct Image {
    args_bytes: HashMap<String, usize>,
}

impl Image {
    /// Reads what NVRTC made; `None` for anything else.
    ///
    /// # Safety
    /// `image` is a whole ELF file, or a text with a zero at its end.
    pub unsafe fn read(image: *const u8) -> Option<Self> {
        // SAFETY: both kinds have at least so many bytes.
        let magic = unsafe { std::slice::from_raw_parts(image, 4) };
        let args_bytes = if magic == b"\x7fELF" {
            // SAFETY: a whole ELF file.
            unsafe { cubin(image) }
        } else {
            // SAFETY: it ends with a zero.
            ptx(unsafe { CStr::from_ptr(image.cast()) }.to_str().ok()?)
        };
        (!args_bytes.is_empty()).then_some(Image { args_bytes })
    }

    /// Bytes of the arguments of a kernel, if it is there.
    pub fn args_bytes(&self, kernel: &str) -> Option<usize> {
        self.args_bytes.get(kernel).copied()
    }
}

/// Looks into the sections `.nv.info.KERNEL` for the attribute CBANK_PARAM_SIZE.
///
/// # Safety
/// `image` is a whole ELF file.
unsafe fn cubin(image: *const u8) -> HashMap<String, usize> {
    let number = |at: usize, bytes: usize| {
        // SAFETY: within the file, as its own tables say.
        let slice = unsafe { std::slice::from_raw_parts(image.add(at), bytes) };
        slice.iter().rev().fold(0, |n, &b| n << 8 | usize::from(b))
    };
    let (table, entry, sections, names) =
        (number(0x28, 8), number(0x3A, 2), number(0x3C, 2), number(0x3E, 2));
    let place = |section: usize| {
        let header = table + section * entry;
        (number(header + 0x18, 8), number(header + 0x20, 8))
    };
    let mut found = HashMap::new();
    for section in 0..sections {
        // SAFETY: names are in the file and end with a zero.
        let name =
            unsafe { CStr::from_ptr(image.add(place(names).0 + number(table + section * entry, 4)).cast()) };
        let Some(kernel) = name.to_str().ok().and_then(|name| name.strip_prefix(".nv.info.")) else {
            continue;
        };
        let (start, len) = place(section);
        let mut at = start;
        while at + 4 <= start + len {
            let (format, attribute, value) = (number(at, 1), number(at + 1, 1), number(at + 2, 2));
            // Format 3 has its value in the header, 4 a length there and then so many bytes.
            if format == 3 && attribute == 0x19 {
                found.insert(kernel.to_owned(), value);
            }
            at += 4 + if format == 4 { value } else { 0 };
        }
    }
    found
}

/// Looks for `.param .align 8 .b8 KERNEL_param_0[136]`.
fn ptx(text: &str) -> HashMap<String, usize> {
    let params = text.lines().filter_map(|line| {
        let (name, rest) = line.split_once("_param_0[")?;
        let bytes = rest.split_once(']')?.0.parse().ok()?;
        Some((name.rsplit(' ').next()?.to_owned(), bytes))
    });
    params.collect()
}
