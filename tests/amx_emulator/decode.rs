//! Machine code to instructions: three-byte VEX prefixes of map 0F38, as every instruction of AMX has.

/// An instruction with its addresses computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instruction {
    /// LDTILECFG from this address.
    Configure(u64),
    /// TILERELEASE.
    Release,
    /// TILEZERO.
    Zero(usize),
    /// TILELOADD: tile, first row, bytes between rows.
    Load(usize, u64, u64),
    /// TILESTORED.
    Store(usize, u64, u64),
    /// TDPBF16PS: sum, left, right.
    Multiply(usize, usize, usize),
}

/// The longest code that is decoded: VEX, opcode, ModRM, SIB, four bytes of displacement.
pub const LONGEST: usize = 10;

/// Decodes the instruction at `code`, which lies at address `rip`; `registers` are rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi,
/// r8 to r15. Returns it with its length in bytes, `None` if it is none of AMX's that is known here.
pub fn decode(code: &[u8; LONGEST], rip: u64, registers: &[u64; 16]) -> Option<(Instruction, usize)> {
    let [vex, extension, operands, opcode, modrm, ..] = *code;
    // R, X and B, which extend register numbers to 4 bits, and vvvv are stored inverted.
    let extend = |bit: u8| if extension >> bit & 1 == 0 { 8 } else { 0 };
    let (map, wide, long, prefix) = (extension & 31, operands >> 7, operands >> 2 & 1, operands & 3);
    if vex != 0xc4 || map != 2 || wide != 0 || long != 0 {
        return None;
    }
    let (r, x, b) = (extend(7), extend(6), extend(5));
    let third = usize::from(!operands >> 3 & 15);
    let (mode, reg, rm) = (modrm >> 6, usize::from(modrm >> 3 & 7), usize::from(modrm & 7));
    // Tiles have 3-bit numbers: an extended one is undefined. All but a product leave vvvv unused, which is 1111.
    if r != 0 || (opcode != 0x5c && third != 0) {
        return None;
    }
    if mode == 3 {
        let instruction = match (opcode, prefix) {
            (0x49, 0) if modrm == 0xc0 => Instruction::Release,
            (0x49, 3) if rm == 0 => Instruction::Zero(reg),
            (0x5c, 2) if b == 0 => Instruction::Multiply(reg, rm, third),
            _ => return None,
        };
        return Some((instruction, 5));
    }
    let has_sib = rm == 4;
    let (scale, index, base) = match has_sib {
        true => (code[5] >> 6, usize::from(code[5] >> 3 & 7) + x, usize::from(code[5] & 7)),
        false => (0, 4, rm),
    };
    let at = 5 + usize::from(has_sib);
    // With mode 0, number 5 stands for no base but a displacement; without a SIB, from the next instruction's address.
    let no_base = mode == 0 && base == 5;
    let (displacement, length) = match mode {
        0 if !no_base => (0, at),
        1 => (i64::from(code[at] as i8), at + 1),
        _ => (i64::from(i32::from_le_bytes([code[at], code[at + 1], code[at + 2], code[at + 3]])), at + 4),
    };
    let start = match (no_base, has_sib) {
        (false, _) => registers[base + b],
        (true, true) => 0,
        (true, false) => rip.wrapping_add(length as u64),
    };
    let start = start.wrapping_add_signed(displacement);
    // Number 4 without extension stands for no index.
    let offset = if index == 4 { 0 } else { registers[index] << scale };
    let instruction = match (opcode, prefix) {
        (0x49, 0) if reg == 0 => Instruction::Configure(start.wrapping_add(offset)),
        // A tile's rows always have a SIB, whose index is their distance.
        (0x4b, 3) if has_sib => Instruction::Load(reg, start, offset),
        (0x4b, 2) if has_sib => Instruction::Store(reg, start, offset),
        _ => return None,
    };
    Some((instruction, length))
}
