//! x
use super::graph::Element;
use skipgpt_passes::ir::DType;
/// x
pub const BOOL: i32 = 9;
/// x
pub fn element_code(e: Element) -> i32 {
    match e {
        Element::Float(DType::F32) => 1,
        Element::Float(DType::F16) => 10,
        Element::Float(DType::BF16) => 16,
        Element::Int64 => 7,
        Element::Bool => 9,
    }
}
