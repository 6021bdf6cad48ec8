//! Small matrices, in the order of operations of the libraries that MONAI calls.
//!
//! The output size of `Spacingd` rounds a number that is often an exact half (5 mm slices to 2 mm), so the last
//! bit of these few products decides shapes. numpy's LAPACK (OpenBLAS) multiplies by the reciprocal of a pivot
//! where a textbook divides: with division 4 % of such ties come out one voxel off.

use super::volume::Affine;

/// A square matrix, row by row.
pub type Matrix<const N: usize> = [[f64; N]; N];

/// The identity.
pub fn identity<const N: usize>() -> Matrix<N> {
    std::array::from_fn(|r| std::array::from_fn(|c| f64::from(u8::from(r == c))))
}

/// The diagonal matrix of `d`.
pub fn diagonal<const N: usize>(d: [f64; N]) -> Matrix<N> {
    std::array::from_fn(|r| std::array::from_fn(|c| if r == c { d[r] } else { 0.0 }))
}

/// a · b, each entry summed from the first term on, without fused multiply-add.
pub fn mul<const N: usize>(a: &Matrix<N>, b: &Matrix<N>) -> Matrix<N> {
    std::array::from_fn(|r| std::array::from_fn(|c| (0..N).fold(0.0, |sum, k| sum + a[r][k] * b[k][c])))
}

/// a⁻¹ · b by LU with partial pivoting (LAPACK gesv as OpenBLAS computes it); `None` where `a` is singular.
pub fn solve<const N: usize>(a: &Matrix<N>, b: &Matrix<N>) -> Option<Matrix<N>> {
    let (mut u, mut x) = (*a, *b);
    for p in 0..N {
        let best = (p..N).fold(p, |best, r| if u[r][p].abs() > u[best][p].abs() { r } else { best });
        u.swap(p, best);
        x.swap(p, best);
        let reciprocal = 1.0 / u[p][p];
        if !reciprocal.is_finite() {
            return None;
        }
        for r in p + 1..N {
            let factor = u[r][p] * reciprocal;
            u[r] = std::array::from_fn(|c| u[r][c] - factor * u[p][c]);
            x[r] = std::array::from_fn(|c| x[r][c] - factor * x[p][c]);
        }
    }
    for r in (0..N).rev() {
        let rest = |c: usize| (r + 1..N).fold(x[r][c], |rest, k| rest - u[r][k] * x[k][c]);
        x[r] = std::array::from_fn(|c| rest(c) * (1.0 / u[r][r]));
    }
    x.iter().flatten().all(|v| v.is_finite()).then_some(x)
}

/// Lower triangular L with L·Lᵀ = a (LAPACK potrf); `None` where `a` is not positive definite.
pub fn cholesky<const N: usize>(a: &Matrix<N>) -> Option<Matrix<N>> {
    let mut l = [[0.0; N]; N];
    for c in 0..N {
        let square = a[c][c] - (0..c).map(|k| l[c][k] * l[c][k]).sum::<f64>();
        l[c][c] = square.sqrt();
        if !(square > 0.0 && square.is_finite()) {
            return None;
        }
        for r in c + 1..N {
            l[r][c] = (a[r][c] - (0..c).map(|k| l[r][k] * l[c][k]).sum::<f64>()) * (1.0 / l[c][c]);
        }
    }
    Some(l)
}

/// Transposed.
pub fn transpose<const N: usize>(a: &Matrix<N>) -> Matrix<N> {
    std::array::from_fn(|r| std::array::from_fn(|c| a[c][r]))
}

/// Rotation, zoom and shear of an affine.
pub fn linear_part(affine: &Affine) -> Matrix<3> {
    std::array::from_fn(|r| std::array::from_fn(|c| affine[r][c]))
}

/// The affine of a linear part and a translation.
pub fn with_translation(linear: &Matrix<3>, translation: [f64; 3]) -> Affine {
    let row = |r: usize| [linear[r][0], linear[r][1], linear[r][2], translation[r]];
    [row(0), row(1), row(2), [0.0, 0.0, 0.0, 1.0]]
}

/// World position of a voxel.
pub fn position(affine: &Affine, voxel: [f64; 3]) -> [f64; 3] {
    std::array::from_fn(|r| (0..3).fold(0.0, |sum, c| sum + affine[r][c] * voxel[c]) + affine[r][3])
}

/// Lengths of the columns of the linear part: voxel sizes, where the affine is in mm.
pub fn column_norms(affine: &Affine) -> [f64; 3] {
    std::array::from_fn(|c| (0..3).map(|r| affine[r][c] * affine[r][c]).sum::<f64>().sqrt())
}

/// The eight corners of a volume in voxels, first axis slowest, 0 before n-1.
pub fn corners(shape: [usize; 3]) -> [[f64; 3]; 8] {
    std::array::from_fn(|corner| {
        std::array::from_fn(|a| if corner >> (2 - a) & 1 == 1 { shape[a] as f64 - 1.0 } else { 0.0 })
    })
}

/// The rotation (or rotoinversion) closest to `a`: P·Qᵀ of its singular value decomposition.
///
/// Singular values up to 3 ε of the largest are dropped, as nibabel does.
pub fn polar_factor(a: &Matrix<3>) -> Option<Matrix<3>> {
    let svd = nalgebra::Matrix3::from_fn(|r, c| a[r][c]).try_svd(true, true, f64::EPSILON, 1000)?;
    let (p, q, s) = (svd.u?, svd.v_t?, svd.singular_values);
    let tolerance = s.max() * 3.0 * f64::EPSILON;
    Some(std::array::from_fn(|r| {
        std::array::from_fn(|c| (0..3).filter(|&k| s[k] > tolerance).map(|k| p[(r, k)] * q[(k, c)]).sum())
    }))
}
