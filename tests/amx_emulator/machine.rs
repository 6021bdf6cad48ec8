//! Tile registers and what the instructions do with them.

/// What a CPU raises instead of executing an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// #UD
    Undefined(&'static str),
    /// #GP
    Protection(&'static str),
}

/// Number of tiles of palette 1.
const TILES: usize = 8;
/// Its rows a tile.
const ROWS: usize = 16;
/// Its bytes a row.
const ROW_BYTES: usize = 64;

/// The tile state of one thread.
pub struct Machine {
    palette: u8,
    start_row: u8,
    row_bytes: [usize; TILES],
    rows: [usize; TILES],
    tiles: [[[u8; ROW_BYTES]; ROWS]; TILES],
}

impl Machine {
    /// Unconfigured.
    pub const fn new() -> Self {
        Machine {
            palette: 0,
            start_row: 0,
            row_bytes: [0; TILES],
            rows: [0; TILES],
            tiles: [[[0; ROW_BYTES]; ROWS]; TILES],
        }
    }

    /// LDTILECFG.
    pub fn configure(&mut self, config: &[u8; 64]) -> Result<(), Fault> {
        match config[0] {
            0 => {
                self.release();
                return Ok(());
            }
            1 => {}
            _ => return Err(Fault::Protection("a palette that is not 0 or 1")),
        }
        // Bytes 2..16 are reserved; 32..48 and 56..64 belong to tiles that palette 1 has not.
        if [2..16, 32..48, 56..64].into_iter().any(|reserved| config[reserved].iter().any(|&b| b != 0)) {
            return Err(Fault::Protection("a reserved byte that is not 0"));
        }
        let mut next = Machine { palette: 1, start_row: config[1], ..Machine::new() };
        for t in 0..TILES {
            let bytes = usize::from(u16::from_le_bytes([config[16 + 2 * t], config[17 + 2 * t]]));
            let rows = usize::from(config[48 + t]);
            if bytes > ROW_BYTES || rows > ROWS {
                return Err(Fault::Protection("a tile larger than 16 rows of 64 bytes"));
            }
            if (bytes == 0) != (rows == 0) {
                return Err(Fault::Protection("a tile with rows but no bytes, or the reverse"));
            }
            (next.row_bytes[t], next.rows[t]) = (bytes, rows);
        }
        *self = next;
        Ok(())
    }

    /// TILERELEASE.
    pub fn release(&mut self) {
        *self = Machine::new();
    }

    /// Number `t`, if it is configured.
    fn tile(&self, t: usize) -> Result<usize, Fault> {
        if self.palette == 0 {
            return Err(Fault::Undefined("tiles are not configured"));
        }
        if t >= TILES || self.rows[t] == 0 {
            return Err(Fault::Undefined("a tile that is not configured"));
        }
        Ok(t)
    }

    /// Number `t`, if its rows can be moved.
    fn movable(&self, t: usize) -> Result<usize, Fault> {
        let t = self.tile(t)?;
        if !self.row_bytes[t].is_multiple_of(4) {
            return Err(Fault::Undefined("rows that are not whole dwords"));
        }
        if usize::from(self.start_row) >= self.rows[t] {
            return Err(Fault::Undefined("a start row beyond the tile"));
        }
        Ok(t)
    }

    /// TILEZERO.
    pub fn zero(&mut self, t: usize) -> Result<(), Fault> {
        let t = self.tile(t)?;
        self.tiles[t] = [[0; ROW_BYTES]; ROWS];
        self.start_row = 0;
        Ok(())
    }

    /// TILELOADD.
    ///
    /// # Safety
    /// The tile's rows must be readable.
    pub unsafe fn load(&mut self, t: usize, start: u64, stride: u64) -> Result<(), Fault> {
        let t = self.movable(t)?;
        let first = usize::from(self.start_row);
        if first == 0 {
            self.tiles[t] = [[0; ROW_BYTES]; ROWS];
        }
        for row in first..self.rows[t] {
            let from = start.wrapping_add(stride.wrapping_mul(row as u64)) as *const u8;
            let to = &mut self.tiles[t][row];
            *to = [0; ROW_BYTES];
            // SAFETY: by the caller's promise; `row_bytes` is at most ROW_BYTES.
            unsafe { from.copy_to_nonoverlapping(to.as_mut_ptr(), self.row_bytes[t]) };
        }
        self.start_row = 0;
        Ok(())
    }

    /// TILESTORED.
    ///
    /// # Safety
    /// The tile's rows must be writable.
    pub unsafe fn store(&mut self, t: usize, start: u64, stride: u64) -> Result<(), Fault> {
        let t = self.movable(t)?;
        for row in usize::from(self.start_row)..self.rows[t] {
            let to = start.wrapping_add(stride.wrapping_mul(row as u64)) as *mut u8;
            // SAFETY: by the caller's promise.
            unsafe { self.tiles[t][row].as_ptr().copy_to_nonoverlapping(to, self.row_bytes[t]) };
        }
        self.start_row = 0;
        Ok(())
    }

    /// TDPBF16PS: c += a b.
    pub fn multiply(&mut self, c: usize, a: usize, b: usize) -> Result<(), Fault> {
        if c == a || c == b || a == b {
            return Err(Fault::Undefined("a product of tiles that are not three"));
        }
        for t in [c, a, b] {
            let t = self.tile(t)?;
            if !self.row_bytes[t].is_multiple_of(4) {
                return Err(Fault::Undefined("rows that are not whole dwords"));
            }
        }
        let (m, n, k) = (self.rows[c], self.row_bytes[c] / 4, self.rows[b]);
        if self.rows[a] != m || self.row_bytes[a] / 4 != k || self.row_bytes[b] / 4 != n {
            return Err(Fault::Undefined("a product of tiles whose shapes do not fit"));
        }
        // Rows and columns beyond the shapes are 0 and stay so: whole tiles can be multiplied.
        let (x, y) = (self.tiles[a], self.tiles[b]);
        let sum = &mut self.tiles[c];
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the features were just found.
            unsafe { multiply_fma(sum, &x, &y) };
        } else {
            multiply_tiles(sum, &x, &y);
        }
        self.start_row = 0;
        Ok(())
    }
}

type Tile = [[u8; ROW_BYTES]; ROWS];

#[target_feature(enable = "avx2,fma")]
unsafe fn multiply_fma(c: &mut Tile, a: &Tile, b: &Tile) {
    multiply_tiles(c, a, b);
}

/// For every element of c: the even and the odd products, one chain of fused multiply-adds from 0 each; their sum; the
/// sum of that and c. Round to nearest even, denormals are 0 on both sides of every step.
#[inline(always)]
fn multiply_tiles(c: &mut Tile, a: &Tile, b: &Tile) {
    let expand = |tile: &Tile| -> [[[f32; ROWS]; 2]; ROWS] {
        let value = |row: &[u8; ROW_BYTES], i: usize| {
            daz(f32::from_bits(u32::from(u16::from_le_bytes([row[2 * i], row[2 * i + 1]])) << 16))
        };
        std::array::from_fn(|r| [0, 1].map(|odd| std::array::from_fn(|i| value(&tile[r], 2 * i + odd))))
    };
    let (a, b) = (expand(a), expand(b));
    for (c, a) in c.iter_mut().zip(&a) {
        let mut sums = [[0.0f32; ROWS]; 2];
        for k in 0..ROWS {
            for odd in 0..2 {
                for n in 0..ROWS {
                    sums[odd][n] = daz(a[odd][k].mul_add(b[k][odd][n], sums[odd][n]));
                }
            }
        }
        for (n, c) in c.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let products = daz(sums[0][n] + sums[1][n]);
            *c = daz(daz(f32::from_le_bytes(*c)) + products).to_le_bytes();
        }
    }
}

/// A denormal's signed 0.
#[inline(always)]
fn daz(v: f32) -> f32 {
    if v.abs() < f32::MIN_POSITIVE { 0.0f32.copysign(v) } else { v }
}
