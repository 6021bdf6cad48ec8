//! Encodings, faults and arithmetic.

use crate::TURN;
use crate::amx_emulator::decode::{Instruction, LONGEST, decode};
use crate::amx_emulator::machine::{Fault, Machine};
use crate::amx_emulator::turn_on;
use spleen_hpc::device::amx::{self, PRODUCT_FLOPS, TILE_BYTES, Tiles};
use spleen_hpc::device::cpu;
use spleen_hpc::rng::Philox;

/// One tile's bytes.
type Tile = [u8; TILE_BYTES];

/// LDTILECFG's operand for tiles of these (rows, bytes a row).
fn config(shapes: &[(u8, u16)]) -> [u8; 64] {
    let mut config = [0; 64];
    config[0] = 1;
    for (t, &(rows, bytes)) in shapes.iter().enumerate() {
        config[16 + 2 * t..][..2].copy_from_slice(&bytes.to_le_bytes());
        config[48 + t] = rows;
    }
    config
}

/// c + a b by the emulator, without its signal.
fn emulated(c: &Tile, a: &Tile, b: &Tile) -> Tile {
    let mut machine = Machine::new();
    let mut result = [0; TILE_BYTES];
    machine.configure(&config(&[(16, 64); 8])).expect("a valid configuration");
    // SAFETY: whole tiles.
    unsafe {
        machine.load(0, c.as_ptr() as u64, 64).expect("a tile");
        machine.load(1, a.as_ptr() as u64, 64).expect("a tile");
        machine.load(2, b.as_ptr() as u64, 64).expect("a tile");
        machine.multiply(0, 1, 2).expect("three tiles");
        machine.store(0, result.as_mut_ptr() as u64, 64).expect("a tile");
    }
    result
}

/// c + a b by the instructions.
fn executed(c: &Tile, a: &Tile, b: &Tile) -> Tile {
    let _turn = TURN.lock().unwrap_or_else(|p| p.into_inner());
    turn_on();
    let mut result = [0; TILE_BYTES];
    // SAFETY: AMX is on; whole tiles.
    unsafe {
        let _tiles = Tiles::configure(16);
        amx::load::<3>(c.as_ptr(), 64);
        amx::load::<7>(a.as_ptr(), 64);
        amx::load::<1>(b.as_ptr(), 64);
        amx::multiply::<3, 7, 1>();
        amx::store::<3>(result.as_mut_ptr(), 64);
    }
    result
}

/// bfloat16 pairs of a tile as f32: [row][column].
fn pairs(tile: &Tile) -> Vec<Vec<f32>> {
    let value = |b: &[u8]| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
    tile.chunks(64).map(|row| row.chunks(2).map(value).collect()).collect()
}

fn floats(tile: &Tile) -> Vec<f32> {
    tile.chunks(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes"))).collect()
}

/// Rounded to f32 from an exact f64, denormals 0. Exact because a product of bfloat16 has 16 bits and the operands here
/// have exponents that differ by less than 53 - 16 - 24.
fn rounded(v: f64) -> f32 {
    let v = v as f32;
    if v.abs() < f32::MIN_POSITIVE { 0.0f32.copysign(v) } else { v }
}

/// The manual's operation, in f64 that is rounded after every step.
fn by_definition(c: &Tile, a: &Tile, b: &Tile) -> Vec<f32> {
    let (c, a, b) = (floats(c), pairs(a), pairs(b));
    let flush = |v: f32| f64::from(rounded(f64::from(v)));
    let mut result = Vec::new();
    for m in 0..16 {
        for n in 0..16 {
            let chain = |odd: usize| {
                (0..16).fold(0.0f32, |sum, k| {
                    rounded(flush(a[m][2 * k + odd]) * flush(b[k][2 * n + odd]) + f64::from(sum))
                })
            };
            let products = rounded(f64::from(chain(0)) + f64::from(chain(1)));
            result.push(rounded(flush(c[16 * m + n]) + f64::from(products)));
        }
    }
    result
}

fn tile_of(mut value: impl FnMut() -> u32) -> Tile {
    let mut tile = [0; TILE_BYTES];
    tile.chunks_mut(4).for_each(|b| b.copy_from_slice(&value().to_le_bytes()));
    tile
}

/// bfloat16 values of exponents 2^-6 to 2^1, any sign.
fn ordinary_pairs(rng: &mut Philox) -> Tile {
    let half = |rng: &mut Philox| (rng.next_u32() & 0x83ff) | (121 << 7);
    tile_of(|| half(rng) | half(rng) << 16)
}

#[test]
fn products_follow_their_definition() {
    let mut rng = Philox::new(1, 1);
    for _ in 0..20 {
        let (a, b) = (ordinary_pairs(&mut rng), ordinary_pairs(&mut rng));
        let c = tile_of(|| (rng.range(-4.0, 4.0) as f32).to_bits());
        let want: Vec<u32> = by_definition(&c, &a, &b).iter().map(|v| v.to_bits()).collect();
        let got: Vec<u32> = floats(&executed(&c, &a, &b)).iter().map(|v| v.to_bits()).collect();
        assert_eq!(got, want);
    }
}

#[test]
fn denormals_count_as_zero() {
    // 2^-127 as operand; 2^-64 2^-64 as product; 2^-126 - 2^-127 as sum; 2^-130 in C.
    let (denormal, small) = (0x0040u32, 0x1f80u32);
    let zero = [0u8; TILE_BYTES];
    let one = tile_of(|| 0x3f80);
    assert_eq!(executed(&zero, &tile_of(|| denormal), &one), zero);
    assert_eq!(executed(&zero, &tile_of(|| small), &tile_of(|| small)), zero);
    let tiny = tile_of(|| 2.0f32.powi(-130).to_bits());
    assert_eq!(executed(&tiny, &zero, &one), zero);
}

#[test]
fn the_emulator_agrees_with_what_executes() {
    // Every bit pattern: infinities, NaN and denormals too. NaN compare as NaN: which one it is, depends on the order of
    // operands that the manual leaves open.
    let mut rng = Philox::new(2, 1);
    for _ in 0..50 {
        let [c, a, b] = [0; 3].map(|_| tile_of(|| rng.next_u32()));
        let canonical = |tile: &Tile| -> Vec<u32> {
            floats(tile).iter().map(|v| if v.is_nan() { u32::MAX } else { v.to_bits() }).collect()
        };
        assert_eq!(canonical(&executed(&c, &a, &b)), canonical(&emulated(&c, &a, &b)));
    }
}

#[test]
fn a_tile_is_loaded_and_stored_with_any_stride() {
    turn_on();
    let from: Vec<u8> = (0..16 * 96 + 64).map(|i| i as u8).collect();
    let mut to = vec![0u8; 16 * 80];
    // SAFETY: AMX is on; 16 rows of 64 bytes lie in both.
    unsafe {
        let _tiles = Tiles::configure(16);
        amx::load::<5>(from[3..].as_ptr(), 96);
        amx::store::<5>(to.as_mut_ptr(), 80);
    }
    for (row, to) in to.chunks(80).enumerate() {
        assert_eq!(to[..64], from[3 + 96 * row..][..64]);
        assert_eq!(to[64..], [0; 16], "only the tile's rows are written");
    }
}

#[test]
fn the_peak_counts_its_products() {
    let _turn = TURN.lock().unwrap_or_else(|p| p.into_inner());
    turn_on();
    assert!(cpu::amx());
    assert_eq!(amx::peak_bf16(3), 18 * PRODUCT_FLOPS);
}

#[test]
fn encodings_are_those_of_the_manual() {
    let mut registers = [0u64; 16];
    registers.iter_mut().enumerate().for_each(|(i, r)| *r = 0x1000 * (i as u64 + 1));
    // As an assembler writes them: objdump's listing of the same text.
    let cases: [(&[u8], Instruction); 9] = [
        // ldtilecfg [rax]
        (&[0xc4, 0xe2, 0x78, 0x49, 0x00], Instruction::Configure(0x1000)),
        // ldtilecfg [r12 + 2*r9 - 4]
        (&[0xc4, 0x82, 0x78, 0x49, 0x44, 0x4c, 0xfc], Instruction::Configure(0xd000 + 2 * 0xa000 - 4)),
        // ldtilecfg [rip + 16]
        (&[0xc4, 0xe2, 0x78, 0x49, 0x05, 0x10, 0, 0, 0], Instruction::Configure(0x400_000 + 9 + 16)),
        // tilerelease
        (&[0xc4, 0xe2, 0x78, 0x49, 0xc0], Instruction::Release),
        // tilezero tmm6
        (&[0xc4, 0xe2, 0x7b, 0x49, 0xf0], Instruction::Zero(6)),
        // tileloadd tmm4, [rsi + rcx]
        (&[0xc4, 0xe2, 0x7b, 0x4b, 0x24, 0x0e], Instruction::Load(4, 0x7000, 0x2000)),
        // tileloadd tmm0, [r13 + 4*r15 + 256]
        (&[0xc4, 0x82, 0x7b, 0x4b, 0x84, 0xbd, 0, 1, 0, 0], Instruction::Load(0, 0xe100, 0x40000)),
        // tilestored [rbp + rdx], tmm7
        (&[0xc4, 0xe2, 0x7a, 0x4b, 0x7c, 0x15, 0x00], Instruction::Store(7, 0x6000, 0x3000)),
        // tdpbf16ps tmm1, tmm5, tmm6
        (&[0xc4, 0xe2, 0x4a, 0x5c, 0xcd], Instruction::Multiply(1, 5, 6)),
    ];
    for (bytes, want) in cases {
        let mut code = [0x90; LONGEST];
        code[..bytes.len()].copy_from_slice(bytes);
        assert_eq!(decode(&code, 0x400_000, &registers), Some((want, bytes.len())), "{bytes:02x?}");
    }
    // TDPBSSD, the 8-bit product; UD2.
    for bytes in [[0xc4, 0xe2, 0x4b, 0x5e, 0xcd], [0x0f, 0x0b, 0, 0, 0]] {
        let mut code = [0x90; LONGEST];
        code[..5].copy_from_slice(&bytes);
        assert_eq!(decode(&code, 0x400_000, &registers), None, "{bytes:02x?}");
    }
}

#[test]
fn what_a_cpu_refuses_is_refused() {
    let protection =
        |config: [u8; 64]| matches!(Machine::new().configure(&config), Err(Fault::Protection(_)));
    let changed = |at: usize, value: u8| {
        let mut config = config(&[(16, 64)]);
        config[at] = value;
        config
    };
    assert!(!protection(config(&[(16, 64); 8])));
    assert!(protection(changed(0, 2)), "palette");
    assert!(protection(changed(5, 1)), "reserved");
    assert!(protection(changed(33, 1)), "tile 8");
    assert!(protection(changed(16, 65)), "65 bytes a row");
    assert!(protection(changed(48, 17)), "17 rows");
    assert!(protection(changed(48, 0)), "bytes without rows");
    let undefined = |result: Result<(), Fault>| matches!(result, Err(Fault::Undefined(_)));
    let mut machine = Machine::new();
    assert!(undefined(machine.zero(0)), "not configured");
    machine.configure(&config(&[(16, 64), (16, 64), (16, 64), (8, 64), (16, 30)])).expect("valid");
    assert!(undefined(machine.zero(5)), "a tile without rows");
    assert!(undefined(machine.multiply(0, 1, 1)), "one tile twice");
    assert!(undefined(machine.multiply(0, 1, 3)), "k of 32 and of 16");
    assert!(undefined(machine.multiply(3, 1, 2)), "8 rows and 16");
    assert!(undefined(machine.multiply(0, 4, 2)), "half a dword");
    assert_eq!(machine.multiply(0, 1, 2), Ok(()));
    machine.release();
    assert!(undefined(machine.multiply(0, 1, 2)), "released");
}
