#include "attributes.h"

#include <locale.h>

#include <clocale>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace sfa_onnx {
namespace {

constexpr int kMaxDepth = 32;

// strtod follows the process's locale, and "0,5" would be read as 0.
double ParseDouble(const char* text, char** end) {
  static const locale_t c_locale = newlocale(LC_NUMERIC_MASK, "C", nullptr);
  return c_locale == nullptr ? std::strtod(text, end) : strtod_l(text, end, c_locale);
}

bool ToFloat(const std::string& text, float* out) {
  char* end = nullptr;
  const double value = ParseDouble(text.c_str(), &end);
  if (text.empty() || *end != '\0') return false;
  *out = static_cast<float>(value);
  return true;
}

bool ToInt(const std::string& text, int64_t* out) {
  char* end = nullptr;
  *out = std::strtoll(text.c_str(), &end, 10);
  return !text.empty() && *end == '\0';
}

bool IsOctal(char c) { return c >= '0' && c <= '7'; }

// "\303\244" -> two bytes, "\\n" -> newline: undoes protobuf's C escaping.
std::string CUnescape(const std::string& text) {
  static const char kFrom[] = "abfnrtv";
  static const char kTo[] = "\a\b\f\n\r\t\v";
  std::string out;
  for (size_t at = 0; at < text.size(); ++at) {
    if (text[at] != '\\' || at + 1 == text.size()) {
      out.push_back(text[at]);
      continue;
    }
    const char next = text[++at];
    if (IsOctal(next)) {
      int code = 0;
      size_t digits = 0;
      for (; digits < 3 && at + digits < text.size() && IsOctal(text[at + digits]); ++digits) {
        code = code * 8 + (text[at + digits] - '0');
      }
      at += digits - 1;
      out.push_back(static_cast<char>(code));
    } else if (const char* found = std::strchr(kFrom, next)) {
      out.push_back(kTo[found - kFrom]);
    } else {
      out.push_back(next);  // quote, backslash, question mark stand for themselves
    }
  }
  return out;
}

// A small JSON reader: it keeps what attributes need and skips any other value.
class Reader {
 public:
  explicit Reader(const char* text) : at_(text) {}

  bool Document(std::vector<Attribute>* out) {
    return Members([&](const std::string& key) {
             if (key != "attribute") return Skip(0);
             return Elements([&] { return OneAttribute(out); });
           }) &&
           (Space(), *at_ == '\0' || Fail("text after the end"));
  }

  const std::string& error() const { return error_; }

 private:
  bool Fail(const char* what) {
    if (error_.empty())
      error_ = std::string(what) + " near '" + std::string(at_).substr(0, 24) + "'";
    return false;
  }

  void Space() { at_ += std::strspn(at_, " \t\r\n"); }

  bool Take(char c) {
    Space();
    if (*at_ != c) return false;
    ++at_;
    return true;
  }

  template <typename Each>
  bool Members(Each each) {
    if (!Take('{')) return Fail("expected an object");
    if (Take('}')) return true;
    do {
      std::string key;
      if (!String(&key)) return false;
      if (!Take(':')) return Fail("expected ':'");
      if (!each(key)) return false;
    } while (Take(','));
    return Take('}') || Fail("expected '}'");
  }

  template <typename Each>
  bool Elements(Each each) {
    if (!Take('[')) return Fail("expected an array");
    if (Take(']')) return true;
    do {
      if (!each()) return false;
    } while (Take(','));
    return Take(']') || Fail("expected ']'");
  }

  bool OneAttribute(std::vector<Attribute>* out) {
    Attribute attribute;
    const bool ok = Members([&](const std::string& key) { return Field(key, &attribute); });
    if (ok) out->push_back(attribute);
    return ok;
  }

  bool Field(const std::string& key, Attribute* to) {
    std::string text;
    if (key == "name") return String(&to->name);
    if (key == "s") {
      if (!String(&text)) return false;
      to->s = CUnescape(text);
      return true;
    }
    if (key == "floats") {
      return Elements([&] {
        std::string item;
        float value = 0.0F;
        if (!Scalar(&item)) return false;
        if (item == "null") {  // how JSON spells what is not finite
          value = std::numeric_limits<float>::quiet_NaN();
        } else if (!ToFloat(item, &value)) {
          return Fail("expected a number");
        }
        to->floats.push_back(value);
        return true;
      });
    }
    if (key != "i" && key != "f" && key != "type") return Skip(0);
    if (!Scalar(&text)) return false;
    if (key == "f") return ToFloat(text, &to->f) || Fail("expected a float");
    int64_t value = 0;
    if (!ToInt(text, &value)) return Fail("expected an integer");
    if (key == "i") {
      to->i = value;
    } else {
      to->type = static_cast<int>(value);
    }
    return true;
  }

  // A number, or a number inside a string: the parser writes FLOAT in both forms.
  bool Scalar(std::string* out) {
    Space();
    if (*at_ == '"') return String(out);
    const size_t length = std::strcspn(at_, ",]} \t\r\n");
    out->assign(at_, length);
    at_ += length;
    return length != 0 || Fail("expected a number");
  }

  bool String(std::string* out) {
    if (!Take('"')) return Fail("expected a string");
    for (; *at_ != '"'; ++at_) {
      if (*at_ == '\0') return Fail("string without an end");
      if (*at_ != '\\') {
        out->push_back(*at_);
        continue;
      }
      ++at_;
      static const char kFrom[] = "\"\\/bfnrt";
      static const char kTo[] = "\"\\/\b\f\n\r\t";
      if (*at_ == 'u') {
        if (!Unicode(out)) return false;
      } else if (const char* found = *at_ == '\0' ? nullptr : std::strchr(kFrom, *at_)) {
        out->push_back(kTo[found - kFrom]);
      } else {
        return Fail("bad escape");
      }
    }
    ++at_;
    return true;
  }

  // \uXXXX below 0x80 only: bytes above are C-escaped before they become JSON.
  bool Unicode(std::string* out) {
    char digits[5] = {0, 0, 0, 0, 0};
    for (int i = 0; i < 4; ++i) {
      if (at_[1 + i] == '\0') return Fail("bad escape");
      digits[i] = at_[1 + i];
    }
    char* end = nullptr;
    const long code = std::strtol(digits, &end, 16);
    if (end != digits + 4 || code >= 0x80) return Fail("bad escape");
    out->push_back(static_cast<char>(code));
    at_ += 4;
    return true;
  }

  bool Skip(int depth) {
    if (depth > kMaxDepth) return Fail("nested too deeply");
    Space();
    std::string ignored;
    if (*at_ == '{') return Members([&](const std::string&) { return Skip(depth + 1); });
    if (*at_ == '[') return Elements([&] { return Skip(depth + 1); });
    return *at_ == '"' ? String(&ignored) : Scalar(&ignored);
  }

  const char* at_;
  std::string error_;
};

}  // namespace

bool ReadAttributes(const char* text, std::vector<Attribute>* out, std::string* error) {
  Reader reader(text);
  if (reader.Document(out)) return true;
  *error = reader.error();
  return false;
}

const Attribute* FindAttribute(const std::vector<Attribute>& all, const char* name) {
  for (const Attribute& attribute : all) {
    if (attribute.name == name) return &attribute;
  }
  return nullptr;
}

const char* TypeName(int type) {
  static const char* const kNames[] = {"UNDEFINED", "FLOAT",  "INT",  "STRING",  "TENSOR",
                                       "GRAPH",     "FLOATS", "INTS", "STRINGS", "TENSORS"};
  return type >= 0 && type < 10 ? kNames[type] : "UNKNOWN";
}

}  // namespace sfa_onnx
