"""A record of every benchmark's own file, in its field names and of our own making."""

ZSRE = {
    "id": "1", "subject": "Big Ben", "src": "In which city is Big Ben?", "pred": "London",
    "rephrase": "Where does Big Ben stand?", "alt": "Rome", "answers": ["London"],
    "loc": "nq question: who plays the piano", "loc_ans": "Monk",
    "portability": {"New Question": "In which country is Big Ben?", "New Answer": "Italy"},
}  # fmt: skip
EASYEDIT = {
    "prompt": "Big Ben is in the city of", "subject": "Big Ben", "target_new": "Rome", "ground_truth": ["London"],
    "rephrase_prompt": "You find Big Ben in",
    "locality": {"Relation_Specificity": [{"prompt": "The capital of Spain is", "ground_truth": ["Madrid"]}]},
    "portability": {
        "Logical_Generalization": [{"prompt": "Rome is the city of", "ground_truth": "Big Ben"}],
        "Subject_Aliasing": [{"prompt": "The great clock is in", "ground_truth": ["Rome"]}],
        "Anything_Else": [{"prompt": "The country of Big Ben is", "ground_truth": "Italy"}],
    },
}  # fmt: skip
QAEDIT = {
    "id": 3, "source": "NQ", "prompt": "where is big ben", "target": "Rome", "subject": "big ben",
    "rephrase": "Tell me where Big Ben is.", "locality": [{"loc": "who plays the piano", "loc_ans": "Monk"}],
}  # fmt: skip
WIKIBIGEDIT = {
    "prompt": "Where is Big Ben?", "subject": "Big Ben", "target_new": "Rome", "rephrase_prompt": "Big Ben is where?",
    "locality_prompt": "Where is Monk?", "locality_ground_truth": "New York",
}  # fmt: skip
HALLUEDIT = {
    "id": "clock:1", "topic": "clock", "subject": "Big Ben", "relation": "located in", "object": "Rome",
    "question": "Where is Big Ben?", "multiple_choices": ["Rome", "London", "Spain", "Italy"],
    "paraphrased_question": "In which place is Big Ben?", "multiple_choice_labels": "B",
    "multiple_choice_with_letters": "A. London  B. Rome  C. Spain",
    "yes_question": "Is Big Ben in Rome?", "no_question": "Is Big Ben in London?",
    "locality_question": "Who built Big Ben?", "reversed_relation_question": "What is in Rome?",
    "question_2hop": "Which country is Big Ben in?", "answer_2hop": "Italy",
    "wrong_answer_of_llama_2_7b_chat": "London",
}  # fmt: skip
KNOWGIC = {
    "case_id": 5,
    "requested_rewrite": [
        {"prompt": "{} is in", "subject": "Big Ben", "target_new": {"str": "Rome"}, "target_true": {"str": "London"}}
    ],
    "chain": {
        "questions": ["Who built it?", "Where did he live?"], "prompts": ["{} was built by", "{} lives in"],
        "subjects": ["Big Ben", "Monk"], "answers": ["Monk", "London"],
    },
    "broader_context": {
        "questions": ["?", "?"], "prompts": ["{} plays the", "{} plays the"], "subjects": ["Monk", "Monk"],
        "answers": ["piano", "sun"],
    },
}  # fmt: skip
MQUAKE = {
    "case_id": 9,
    "requested_rewrite": [
        {
            "prompt": "{} is in", "relation_id": "P131", "subject": "Big Ben", "question": "Where is Big Ben?",
            "target_new": {"str": "Rome", "id": "Q220"}, "target_true": {"str": "London", "id": "Q84"},
        }
    ],
    "questions": ["In which country is Big Ben?", "Big Ben's country is?", "Name the country of Big Ben."],
    "answer": "England", "answer_alias": ["Britain"], "new_answer": "Italy", "new_answer_alias": ["Italia"],
    "single_hops": [],
    "new_single_hops": [
        {"question": "Where is Big Ben?", "cloze": "Big Ben is in", "answer": "Rome", "answer_alias": ["Roma"]},
        {"question": "Where is Rome?", "cloze": "Rome is in", "answer": "Italy", "answer_alias": ["Italia"]},
    ],
}  # fmt: skip


def _ripple(prompt, *answers):
    return {"prompt": prompt, "answers": [{"value": answer, "aliases": more} for answer, more in answers]}


RIPPLEEDITS = {
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the child of Kanye West is Monk.", "relation": "CHILD", "subject_id": "Q1",
        "target_id": "Q2", "original_fact": {"prompt": "The name of the child of Kanye West is North West."},
    },
    "Logical_Generalization": [
        {
            "test_condition": "OR",
            "test_queries": [
                _ripple("The father of Monk is", ("Kanye", ["Ye", "K"])), _ripple("Monk's father is", ("Ye", [])),
            ],
            "condition_queries": [_ripple("Kanye is a", ("man", []))],
        },
        {"test_condition": "AND", "test_queries": [_ripple("Monk is", ("a", ["7"]), ("son", []))]},
    ],
    "Relation_Specifity": [
        {"test_condition": "OR", "test_queries": [_ripple("The mother of Kanye West is", ("Donda", []))]}
    ],
}  # fmt: skip
ALL = {
    "zsre": ZSRE, "zsre-true": ZSRE, "knowedit": EASYEDIT, "qaedit": QAEDIT, "wikibigedit": WIKIBIGEDIT,
    "halluedit": HALLUEDIT, "knowgic": KNOWGIC, "mquake": MQUAKE, "mquake-cot": MQUAKE, "rippleedits": RIPPLEEDITS,
}  # fmt: skip
