//! From files to patches: host only, never sees a tensor.

pub mod volume;

pub(crate) mod affine;

pub(crate) mod transpose;

pub(crate) mod nifti_fields;

pub mod nifti_header;

pub(crate) mod gunzip;

mod nifti_stream;

pub mod nifti;

pub mod nifti_write;

pub mod orientation;

pub mod resample;

pub mod interpolate;

pub(crate) mod separable;

pub mod preprocess;

pub(crate) mod publish;

pub mod dataset;

pub mod scan;

pub mod sampler;

pub mod cache_file;

pub mod cache;

pub mod prefetch;

pub mod anatomy;

pub mod phantom;
