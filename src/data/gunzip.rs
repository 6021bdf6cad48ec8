//! Inflates a gzip file of one or more members.

use std::io::{BufRead, Read, Result};

use flate2::bufread::GzDecoder;

/// The first byte of every gzip member.
const MEMBER: u8 = 0x1f;

/// Members back to back are one stream, each with its checksum verified; bytes behind the last one that do not begin
/// another end the stream, as they do for gzip (which warns) and nibabel (which never looks there).
pub(super) struct Gunzip<R> {
    /// `None` after the last one.
    member: Option<GzDecoder<R>>,
}

impl<R: BufRead> Gunzip<R> {
    pub fn new(compressed: R) -> Self {
        Gunzip { member: Some(GzDecoder::new(compressed)) }
    }
}

impl<R: BufRead> Read for Gunzip<R> {
    fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        while let Some(mut member) = self.member.take() {
            let taken = match member.read(into) {
                Ok(taken) => taken,
                // The caller may try again, after an interrupted system call for one.
                Err(error) => {
                    self.member = Some(member);
                    return Err(error);
                }
            };
            if taken > 0 || into.is_empty() {
                self.member = Some(member);
                return Ok(taken);
            }
            let mut rest = member.into_inner();
            if rest.fill_buf()?.first() == Some(&MEMBER) {
                self.member = Some(GzDecoder::new(rest));
            }
        }
        Ok(0)
    }
}
