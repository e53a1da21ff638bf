"""Chat templates in the styles that model families use, written for these tests."""

CHATML = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

HEADERS = """\
{% set ns = namespace(system='You are helpful.', rest=messages) %}
{% if messages[0].role == 'system' %}
    {% set ns.system = messages[0].content %}
    {% set ns.rest = messages[1:] %}
{% endif %}
{{- bos_token }}<|header|>system<|/header|>

Today is {{ strftime_now('%Y') | length }} digits long. {{ ns.system }}<|eot|>
{%- for message in ns.rest %}
<|header|>{{ message.role }}<|/header|>

{{ message.content | trim }}<|eot|>
{%- endfor %}
{% if add_generation_prompt %}
<|header|>assistant<|/header|>

{% endif %}
"""

INSTRUCT = """\
{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate user/assistant/user/...') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}
{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}
{% else %}
{% continue %}
{% endif %}
{% endfor %}
"""

TURNS_WITH_JSON = """\
{%- macro turn(message, last) -%}
<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}
{{ {'text': message.content, 'last': last} | tojson }}
{{ [message.content] | tojson(indent=2) }}<end_of_turn>
{% endmacro -%}
{{ bos_token }}
{%- for message in messages -%}
{%- if loop.index > 3 %}{% break %}{% endif -%}
{{ turn(message, loop.last) }}
{%- endfor -%}
{%- if add_generation_prompt and enable_thinking is defined and not enable_thinking -%}
<no_thinking>
{%- endif -%}
{%- if add_generation_prompt -%}<start_of_turn>model{{ '\n' }}{%- endif -%}
"""

ALL = {"chatml": CHATML, "headers": HEADERS, "instruct": INSTRUCT, "turns_with_json": TURNS_WITH_JSON}
