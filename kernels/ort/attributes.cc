#include "attributes.h"

#include <math.h>
#include <string.h>

namespace sfa {

bool AttributeReader::Ok(OrtStatus* status) {
  if (status == nullptr) return true;
  api_->ReleaseStatus(status);
  return false;
}

bool AttributeReader::ReadString(const char* name, char* text, size_t size) {
  size_t needed = 0;
  if (!Ok(api_->KernelInfoGetAttribute_string(info_, name, nullptr, &needed))) return false;
  if (needed > size) {
    snprintf(text, size, "(%zu characters)", needed - 1);
    return true;
  }
  return Ok(api_->KernelInfoGetAttribute_string(info_, name, text, &needed));
}

void AttributeReader::NameNode(const char* op_type) {
  char name[512] = {};  // one that is longer is left out
  size_t size = sizeof name;
  if (!Ok(api_->KernelInfo_GetNodeName(info_, name, &size))) snprintf(name, sizeof name, "?");
  error_->Add("%s '%s': ", op_type, name);
}

const char* AttributeReader::OtherType(const char* name) {
  float f = 0;
  int64_t i = 0;
  size_t size = 0;
  if (Ok(api_->KernelInfoGetAttribute_float(info_, name, &f))) return "a float";
  if (Ok(api_->KernelInfoGetAttribute_int64(info_, name, &i))) return "an int";
  if (Ok(api_->KernelInfoGetAttribute_string(info_, name, nullptr, &size))) return "a string";
  // One of these answers for lists of the other type as well.
  if (Ok(api_->KernelInfoGetAttributeArray_float(info_, name, nullptr, &size)) ||
      Ok(api_->KernelInfoGetAttributeArray_int64(info_, name, nullptr, &size))) {
    return "a list";
  }
  return nullptr;
}

bool AttributeReader::Missing(const char* name, const char* expected) {
  const char* other = OtherType(name);
  if (other != nullptr) {
    return error_->Add("attribute %s: expected %s, got %s", name, expected, other);
  }
  return error_->Add("attribute %s: expected %s, got none (it is required)", name, expected);
}

bool AttributeReader::Float(const char* name, float* value) {
  int64_t integer = 0;
  if (!Ok(api_->KernelInfoGetAttribute_float(info_, name, value))) {
    if (!Ok(api_->KernelInfoGetAttribute_int64(info_, name, &integer))) {
      return Missing(name, "a float");
    }
    *value = static_cast<float>(integer);
  }
  if (isfinite(*value)) return true;
  return error_->Add("attribute %s: expected a finite float, got %f", name,
                     static_cast<double>(*value));
}

bool AttributeReader::OptionalExactFloat(const char* name, float* value) {
  size_t count = 0;
  if (!Ok(api_->KernelInfoGetAttributeArray_float(info_, name, nullptr, &count))) {
    return OtherType(name) == nullptr || Missing(name, "a list of one float");
  }
  if (count != 1) {
    return error_->Add("attribute %s: expected a list of one float, got %zu", name, count);
  }
  float exact = 0;
  if (!Ok(api_->KernelInfoGetAttributeArray_float(info_, name, &exact, &count))) return true;
  if (!isfinite(exact)) {
    return error_->Add("attribute %s: expected a finite float, got %f", name,
                       static_cast<double>(exact));
  }
  *value = exact;
  return true;
}

bool AttributeReader::Int(const char* name, int64_t fallback, int64_t* value) {
  if (Ok(api_->KernelInfoGetAttribute_int64(info_, name, value))) return true;
  if (fallback == kRequired || OtherType(name) != nullptr) return Missing(name, "an int");
  *value = fallback;
  return true;
}

bool AttributeReader::IntOf(const char* name, int64_t fallback, int64_t legal, int64_t* value) {
  int64_t got = 0;
  if (!Int(name, fallback, &got)) return false;
  if (value != nullptr) *value = got;
  if (got == legal) return true;
  return error_->Add("attribute %s: expected %lld, got %lld", name, static_cast<long long>(legal),
                     static_cast<long long>(got));
}

bool AttributeReader::IntOf2(const char* name, int64_t fallback, int64_t legal, int64_t or_legal,
                             int64_t* value) {
  if (!Int(name, fallback, value)) return false;
  if (*value == legal || *value == or_legal) return true;
  return error_->Add("attribute %s: expected %lld or %lld, got %lld", name,
                     static_cast<long long>(legal), static_cast<long long>(or_legal),
                     static_cast<long long>(*value));
}

bool AttributeReader::IntInRange(const char* name, int64_t fallback, int64_t low, int64_t high,
                                 int64_t* value) {
  if (!Int(name, fallback, value)) return false;
  if (low <= *value && *value <= high) return true;
  return error_->Add("attribute %s: expected an int in [%lld, %lld], got %lld", name,
                     static_cast<long long>(low), static_cast<long long>(high),
                     static_cast<long long>(*value));
}

bool AttributeReader::Choice(const char* name, const char* const* choices, int* value) {
  char text[64] = {};
  if (!ReadString(name, text, sizeof text)) {
    if (OtherType(name) != nullptr) return Missing(name, "a string");
    *value = 0;
    return true;
  }
  for (int i = 0; choices[i] != nullptr; ++i) {
    if (strcmp(text, choices[i]) == 0) {
      *value = i;
      return true;
    }
  }
  error_->Add("attribute %s: expected ", name);
  for (int i = 0; choices[i] != nullptr; ++i) error_->Add(i ? " or %s" : "%s", choices[i]);
  return error_->Add(", got '%s'", text);
}

}  // namespace sfa
